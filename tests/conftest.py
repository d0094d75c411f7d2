"""torch.compile's cache does not look at ATEN_CPU_CAPABILITY: what was compiled under one value is wrong under another
(torch 2.14.1, with torch's functions alone). So each has a cache of its own."""

import getpass
import os
import tempfile
from pathlib import Path

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
