"""Tools of development: they run notebooks, build and check the website, and keep what is generated in step."""
