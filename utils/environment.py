"""What this machine offers a run: packages, devices, memory, the network. Nothing is changed."""

import os
import shutil
import threading
import urllib.error
import urllib.request
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch
from huggingface_hub import constants, get_hf_file_metadata
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
FOR_TESTS = ("pytest", "pytest-xdist", "ruff")
TIMEOUT = 3  # seconds for a look at the network


def outdated_packages() -> list[str]:
    """What of requirements.txt is missing or older than the lower bound there, in words."""
    found = []
    for line in REQUIREMENTS.read_text().splitlines():
        if text := line.split("#")[0].strip():
            wanted = Requirement(text)
            have = installed(wanted.name)
            if wanted.name not in FOR_TESTS and not (have and wanted.specifier.contains(have)):
                found.append(f"{wanted} (here: {have or 'none'})")
    return found


def installed(name: str) -> str | None:
    """Version of a package, without the build's suffix; None if it is not installed."""
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None


def gpu_names() -> list[str]:
    """Of the visible GPUs."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def lacks_bf16() -> bool:
    """Whether the GPUs can only emulate bf16."""
    return not torch.cuda.is_bf16_supported(including_emulation=False)


def gpu_memory() -> int | None:
    """Free bytes of the fullest visible GPU; None without one."""
    num = torch.cuda.device_count()
    return min((torch.cuda.mem_get_info(i)[0] for i in range(num)), default=None)


def cpu_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def free_ram() -> int:
    """Bytes."""
    return psutil.virtual_memory().available


def free_shared_memory() -> int | None:
    """Bytes that loader workers can hand batches over in; None where there is no /dev/shm."""
    place = Path("/dev/shm")
    return shutil.disk_usage(place).free if place.is_dir() else None


def why_unreachable(url: str) -> str | None:
    """Why a download of `url` would fail; None if it would begin. Fetches no content."""
    if not url.startswith(constants.ENDPOINT):
        return _why_no_answer(url)
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    reason = _why_no_answer(constants.ENDPOINT)
    return reason or _why_refused(url)


@cache
def _why_no_answer(url: str) -> str | None:
    """In a thread of its own: the time limit of a request does not hold for looking up its host."""
    answers = [f"{urlsplit(url).netloc} cannot be reached"]
    asking = threading.Thread(target=lambda: answers.append(_ask(url)), daemon=True)
    asking.start()
    asking.join(TIMEOUT + 1)
    return answers[-1]


def _ask(url: str) -> str | None:
    """One HEAD; a server that refuses this method has answered, too."""
    host = urlsplit(url).netloc
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:
        return f"{host} answers {error.code}" if error.code == 404 else None
    except OSError:
        return f"{host} cannot be reached"
    return None


def _why_refused(url: str) -> str | None:
    """The hub's answer for one file, with the user's own login, as a download would ask."""
    try:
        get_hf_file_metadata(url, timeout=TIMEOUT)
    except GatedRepoError:
        return "its licence must be accepted on its page first, then log in: `hf auth login`"
    except HfHubHTTPError as error:
        return f"the hub answers {error.response.status_code}"
    except Exception as error:  # which HTTP library, hence which error, depends on the hub client
        return f"the hub cannot be reached ({type(error).__name__})"
    return None
