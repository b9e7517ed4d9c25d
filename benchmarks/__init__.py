"Measured comparisons with other packages; README.md says how to run and to read them."
