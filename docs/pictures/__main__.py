"""`python -m docs.pictures [NAME]…` computes and draws the pictures, all without a name."""

import sys

from docs.pictures import PICTURES, keep

for name in sys.argv[1:] or PICTURES:
    keep.write(name, PICTURES[name])
    print(name, (keep.HERE / f"{name}.svg").stat().st_size, "bytes")
