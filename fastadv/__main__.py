"""python -m fastadv"""

import os
import sys

# Python puts the working folder before all packages. A file beside a user's pictures, such as torch.py, must not be
# imported in place of a package.
if sys.path and sys.path[0] == os.getcwd():
    sys.path.append(sys.path.pop(0))

from fastadv.cli import main

if __name__ == "__main__":
    main()
