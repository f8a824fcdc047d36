"""The network prepared for sampling.

What `auto` swallows is logged to "odelt_fast", which stays silent without a handler of the caller's
own: set up here, below everything that logs, and not in odelt_fast/__init__.py, because the import
costs `--help` 4 ms.
"""

import logging

logging.getLogger("odelt_fast").addHandler(logging.NullHandler())
