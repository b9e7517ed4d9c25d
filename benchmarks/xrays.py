"""X-rays of a CT as a detector would take them, so that no picture of the model that is fitted to them is just like
them.

Lengths on the detector are in mm. Intensities are parts of what the detector receives without a patient.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchio import ScalarImage, Subject

from diffdrr.geometry import RigidTransform
from diffdrr.registration import blur
from diffdrr.rendering import DRR
from diffdrr.volumes import save_arrays


@dataclass(frozen=True)
class Exposure:
    """How an X-ray is taken, and what disturbs it.

    The defaults are those of a single frame of fluoroscopy, without a grid against scatter."""

    sdd: float = 1020.0  # source-to-detector distance, mm
    height: int = 256  # rows and columns, pixels
    delx: float = 400 / 256  # size of a pixel, mm
    oversampling: int = 4  # rays along each side of a pixel, whose intensities are averaged
    water: float = 0.0206  # attenuation of water at 60 keV, 1/mm
    photons: float = 8000.0  # that reach a square millimetre of the detector without a patient
    scatter: float = 0.5  # ratio of the scattered to the primary radiation, summed over what lies behind the patient; locally from 0.3 in the lungs to 7 in the spine
    scatter_width: float = 40.0  # standard deviation of the haze that a narrow beam makes on the detector, mm
    gain: float = 0.05  # standard deviation of the change of the detector's gain from its middle to its edges
    rod: float = 8.0  # diameter of a steel rod that lies across the detector, mm
    steel: float = 0.95  # its attenuation at 60 keV, 1/mm
    aperture: float = 195.0  # radius of the collimated field, mm

    @property
    def photons_per_pixel(self) -> float:
        return self.photons * self.delx**2

    def camera(
        self,
        subject: Subject,
        oversampling: int = 1,  # rays along each side of a pixel
    ) -> DRR:
        "Make the camera. It interpolates between voxels."
        return DRR(
            subject,
            sdd=self.sdd,
            height=self.height * oversampling,
            delx=self.delx / oversampling,
            renderer="trilinear",
        )


@dataclass(frozen=True)
class Patient:
    """A CT whose density is what attenuates: that of water is 1.

    The density which pictures are rendered from begins at the lungs instead, so the two differ by more than a
    factor."""

    subject: Subject
    digest: str  # of the voxels and of where they are

    @classmethod
    def of(
        cls,
        subject: Subject,  # as `read` made it
    ) -> Patient:
        "Take the attenuation from the definition of the Hounsfield unit."
        attenuation, affine = (1 + subject.volume.data.float() / 1000).clamp(min=0), subject.volume.affine
        digest = hashlib.blake2b(attenuation.numpy().tobytes() + affine.tobytes(), digest_size=16).hexdigest()
        density = ScalarImage(tensor=attenuation, affine=affine)
        return cls(Subject(volume=density, density=density, mask=None, reorient=subject.reorient), digest)


def transmit(
    patient: Patient,
    pose: RigidTransform,  # (1)
    exposure: Exposure,
) -> torch.Tensor:  # (1, 1, H, W) intensity
    "Let the patient absorb (Beer, 1852), and average over each pixel what arrives there."
    with torch.no_grad():
        line_integrals = exposure.water * exposure.camera(patient.subject, exposure.oversampling)(pose, n_points=None)
    return F.avg_pool2d(torch.exp(-line_integrals), exposure.oversampling)


def detector_coordinates(
    exposure: Exposure,
) -> tuple[torch.Tensor, torch.Tensor]:  # (H, W) each, mm to the right and downwards from the middle
    "Return where the centres of the pixels are."
    offset = (torch.arange(exposure.height) + 0.5 - exposure.height / 2) * exposure.delx
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    return x, y


def haze(
    primary: torch.Tensor,  # (1, 1, H, W) intensity
    exposure: Exposure,
) -> torch.Tensor:  # (1, 1, H, W) intensity
    """Estimate the scattered radiation.

    Rays scatter in proportion to what they pass through and to what is left of them (Ohnesorge et al., European
    Radiology 9, 1999).

    The haze has the given ratio to the primary radiation over the pixels that see at most half of the unattenuated
    intensity.
    """
    spread = blur(-primary * primary.log(), exposure.scatter_width / exposure.delx)
    behind = primary < 0.5
    return spread * (exposure.scatter * primary[behind].sum() / spread[behind].sum())


def rod_transmission(
    exposure: Exposure,
    generator: torch.Generator,
) -> torch.Tensor:  # (H, W) part of the intensity that gets through
    "Lay a steel rod across the field, in a random direction and not far from the middle."
    x, y = detector_coordinates(exposure)
    angle = torch.rand(1, generator=generator) * torch.pi
    offset = torch.randn(1, generator=generator) * 0.3 * exposure.aperture
    distance = (x * angle.cos() + y * angle.sin() - offset).abs()
    chord = (exposure.rod**2 - 4 * distance.square()).clamp(min=0).sqrt()
    return torch.exp(-exposure.steel * chord)


def uneven_gain(
    exposure: Exposure,
    generator: torch.Generator,
) -> torch.Tensor:  # (H, W) factor on the intensity
    "Draw a gain that varies slowly: a plane and a saddle."
    x, y = (2 * c / (exposure.height * exposure.delx) for c in detector_coordinates(exposure))
    a, b, c = torch.randn(3, generator=generator) * exposure.gain
    return 1 + a * x + b * y + c * x * y


def collimated_field(
    exposure: Exposure,
) -> torch.Tensor:  # (1, 1, H, W) 1 inside, 0 outside
    "Return the pixels that a round collimator lets radiation reach."
    x, y = detector_coordinates(exposure)
    return (torch.hypot(x, y) < exposure.aperture).float()[None, None]


def count_photons(
    intensity: torch.Tensor,  # (1, 1, H, W)
    photons: float,  # per pixel at an intensity of 1
    generator: torch.Generator,
) -> torch.Tensor:  # (1, 1, H, W) intensity
    "Add the noise of counting."
    return torch.poisson(intensity * photons, generator=generator) / photons


def take_xray(
    patient: Patient,
    pose: RigidTransform,  # (1)
    exposure: Exposure,
    seed: int,  # of noise, gain, and rod
) -> torch.Tensor:  # (1, 1, H, W) negative logarithm of the intensity
    "Take an X-ray. A pixel without photons counts as one with a single photon."
    generator = torch.Generator().manual_seed(seed)
    primary = transmit(patient, pose, exposure)
    intensity = primary * rod_transmission(exposure, generator) + haze(primary, exposure)
    intensity = intensity * uneven_gain(exposure, generator) * collimated_field(exposure)
    photons = exposure.photons_per_pixel
    return -count_photons(intensity, photons, generator).clamp(min=1 / photons).log()


def cached_xray(
    patient: Patient,
    pose: RigidTransform,  # (1)
    exposure: Exposure,
    seed: int,
    folder: Path,
) -> torch.Tensor:  # (1, 1, H, W)
    "Take an X-ray, or read it, if one with the same parameters was taken by this very file."
    parameters = {
        "exposure": asdict(exposure),
        "pose": pose.matrix.tolist(),
        "seed": seed,
        "ct": patient.digest,
        "code": Path(__file__).read_text(),
    }
    path = folder / f"{hashlib.blake2b(json.dumps(parameters).encode(), digest_size=16).hexdigest()}.npz"
    if not path.exists():
        save_arrays(path, xray=take_xray(patient, pose, exposure, seed).numpy())
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["xray"])
