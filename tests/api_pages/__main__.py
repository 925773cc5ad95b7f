"""Write the API reference to build/api."""

from . import FOLDER, build

build(FOLDER)
print(FOLDER / "index.html")
