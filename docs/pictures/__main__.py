"""`python -m docs.pictures [--draw] [NAME]…` computes and draws pictures, without a name all.

`--draw` draws what is kept, and computes nothing.
"""

import sys

from docs.pages import put
from docs.pictures import PICTURES, choice, keep

names = [name for name in sys.argv[1:] if name != "--draw"]
for name in names or PICTURES:
    if "--draw" not in sys.argv:
        keep.compute(name, PICTURES[name])
    keep.draw(name, PICTURES[name])
    print(name, (keep.HERE / f"{name}.svg").stat().st_size, "bytes")
page = keep.HERE.parent / "choosing.md"
page.write_text(put(page.read_text("utf-8"), "the list", choice.listing()), "utf-8")
