"""What `python -m ipykernel_launcher` does, in a process of the fork server: see kernel.py.

`COMMAND`, `FOLDER` and `ENVIRONMENT` are given when the file is run.
"""

import os
import sys
from pathlib import Path

from ipykernel.kernelapp import IPKernelApp

os.chdir(FOLDER)  # noqa: F821
os.environ.clear()
os.environ.update(ENVIRONMENT)  # noqa: F821
sys.path[:] = [place for place in sys.path if Path(place) != Path(__file__).parent]
IPKernelApp.launch_instance(COMMAND)  # noqa: F821
