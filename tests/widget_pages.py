"""What the tests of all widgets need: what a page of `fvlm.instruments.live_picture` holds, taken out as a browser would, and what bad input meets."""
import base64
import json
import re
import zlib

import pytest


def bytes_of(planes, coded):
    "A buffer as it was before it was packed."
    data = base64.b64decode(coded)
    if not planes:
        return data
    apart = zlib.decompress(data)
    whole = bytearray(len(apart))
    whole[0::2], whole[1::2] = apart[:len(apart) // 2], apart[len(apart) // 2:]
    return bytes(whole)


def state_of(page):
    "Name -> value, with the bytes in their places."
    part = lambda name: json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)[1])  # noqa: E731
    buffers = [bytes_of(*each) for each in part("buffers")]

    def revived(value):
        if isinstance(value, dict):
            return buffers[value["$buffer"]] if "$buffer" in value else {name: revived(each) for name, each in value.items()}
        return [revived(each) for each in value] if isinstance(value, list) else value

    return revived(part("state"))


def is_one_sentence(act, kind, words):
    "Calling `act` is refused with an error of this kind, which says this on one line."
    with pytest.raises(kind, match=words) as caught:
        act()
    assert "\n" not in str(caught.value)
