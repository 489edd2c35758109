"""python -m fastadv"""

import os
import sys

# Python has put the working folder before all packages: what lies beside someone's pictures must not take their place.
if sys.path and sys.path[0] == os.getcwd():
    sys.path.append(sys.path.pop(0))

from fastadv.cli import main

if __name__ == "__main__":
    main()
