"""What Windows lacks is not needed: imports, files and runs in a process in which all of that is taken away."""

import os
import subprocess
import sys
from pathlib import Path

# The rest of a program runs as if on Windows: without what POSIX has beyond it, and where a file that is open,
# by a descriptor or in memory, can't be replaced, nor a folder renamed that such a file lies in.
ON_WINDOWS = """
import ctypes, os, pkgutil, sys
from pathlib import Path
import torch, matplotlib, safetensors.torch, sklearn.datasets, tqdm.auto  # which are other programs there
import torch._inductor.runtime.runtime_utils

class Kernel32:
    def __init__(self):
        self.open, self.error = [], 0

    def CreateMutexW(self, attributes, owner, name):
        assert name.startswith("Global\\\\") and "/" not in name
        self.error = 183 if name in self.open else 0
        self.open.append(name)
        return len(self.open)

    def CloseHandle(self, handle):
        self.open[handle - 1] = None

    def GetPhysicallyInstalledSystemMemory(self, kilobytes):
        kilobytes._obj.value = 1 << 23

kernel32 = Kernel32()
ctypes.WinDLL = lambda name, use_last_error: {"kernel32": kernel32}[name]
ctypes.windll = type("windll", (), {"kernel32": kernel32})
ctypes.get_last_error = lambda: kernel32.error
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("O_DIRECTORY", "chown", "fchmod", "fchown", "getuid", "mkfifo", "sysconf"):
    delattr(os, name)
sys.platform = "win32"

def is_open(place):
    files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{n}")]
    with open("/proc/self/maps") as maps:
        files += [line.split(maxsplit=5)[-1].strip() for line in maps]
    return any(file == str(place) or file.startswith(f"{place}/") for file in files)

def opened(path, *rest, open=os.open, **more):
    if os.path.isdir(path) and sys._getframe(1).f_globals["__name__"] != "shutil":
        raise PermissionError(path)
    return open(path, *rest, **more)

def renamed(old, new, rename=os.replace):
    if is_open(old) or is_open(new) or os.path.isdir(new):
        raise PermissionError(new)
    rename(old, new)

os.open, os.replace = opened, renamed
"""


def on_windows(program: str, folder: Path) -> str:
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", ON_WINDOWS + program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_module_is_imported(tmp_path: Path) -> None:
    program = """
import mas_ext
for found in pkgutil.walk_packages(mas_ext.__path__, "mas_ext."):
    if not found.name.startswith(("mas_ext.integrations.", "mas_ext._C_")):
        __import__(found.name)
        print(found.name)
from mas_ext.comparison.bench import eager_fits
theta = [torch.empty(2**30, device="meta")]
print(eager_fits(0, theta), eager_fits(1, theta))
"""
    *modules, fits = on_windows(program, tmp_path).splitlines()
    assert {"mas_ext.state.replacing", "mas_ext.cli", "mas_ext.comparison.sweep"} <= set(modules)
    assert fits == "True False", "of 8 GiB"


def test_a_penalty_is_saved_again_over_the_file_that_was_loaded(tmp_path: Path) -> None:
    program = """
import mas_ext
from mas_ext.state import files, replacing
model = torch.nn.Linear(3, 2)
penalty = mas_ext.FusedMASPenalty(model)
penalty.consolidate([torch.rand(4, 3)])
left = Path(".mas_ext.killed")
left.mkdir()
penalty.save("file")
assert not left.exists()
tensors = files.load("file")
loaded = mas_ext.FusedMASPenalty.load("file", model)
assert torch.equal(loaded.omega["weight"], penalty.omega["weight"]) and loaded.omega["weight"].any()
loaded.save("file")
kept = sorted(tensors)
with replacing.replacing("slow") as new:
    new.write_text("slow")
    replacing.write(Path("fast"), "fast")
assert Path("slow").read_text() == "slow"
with open("file") as reader:
    try:
        penalty.save("file")
    except PermissionError:
        print(sorted(os.listdir()), kept == sorted(files.load("file")))
"""
    assert on_windows(program, tmp_path) == "['fast', 'file', 'slow'] True\n"


def test_a_run_is_held_and_goes_on(tmp_path: Path) -> None:
    """In a folder that is there, and empty; what a resumed training finds has the bits of the first."""
    program = """
from mas_ext.comparison import directory, sweep
from mas_ext.comparison.options import Config
from mas_ext.state import replacing
config = Config.read({"tasks": 2, "hidden": [8], "epochs": 1, "lr": 0.01, "methods": {"mas": {}}})
out = Path("run")
out.mkdir()
sweep.run(config, out)
result = out / "mas-seed0" / "result.json"
before = result.read_bytes()
result.unlink()
with replacing.alone_in(out):
    try:
        sweep.run(config, out, resume=True)
    except FileExistsError as error:
        print(error)
sweep.run(config, out, resume=True)
print(result.read_bytes() == before, sorted(os.listdir()))
"""
    held, same = on_windows(program, tmp_path).splitlines()[-2:]
    assert held.endswith("run: got a folder that another process works in, expected to be alone")
    assert same == "True ['run']"
