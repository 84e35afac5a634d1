"""What a page of `fvlm.instruments.live_picture` holds, taken out as a browser would."""
import base64
import json
import re
import zlib


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
