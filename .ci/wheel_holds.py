"""`python .ci/wheel_holds.py WHEEL CHECKOUT`: the wheel holds every file of the package that the
checkout has, and nothing else."""

import os
import sys
import zipfile
from pathlib import Path

wheel, checkout = sys.argv[1], Path(sys.argv[2])
there = {
    str(Path(folder, name).relative_to(checkout))
    for folder, _, names in os.walk(checkout / "odelt_fast", followlinks=True)
    for name in names
    if not name.startswith(".")
}
held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("odelt_fast/")}
if there != held:
    sys.exit(f"missing in the wheel: {sorted(there - held)}; too many: {sorted(held - there)}")
print(f"the wheel holds all {len(held)} files of the package")
