"""`python -m benchmarks.study`: see study.py."""

import sys

from benchmarks.study.study import main

sys.exit(main())
