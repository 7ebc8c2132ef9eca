"""Count the hostile image URLs that reach a server which they must not reach.

    python benchmarks/hostile_urls.py

Each URL in `tests/hostile_urls.py` passes through the guard of `service/web_images.py`, with a resolver and servers in
this process. The internet is not used. One server stands in for all public addresses, and the other one for all other
addresses and ports. An escape is a connection to the second server, or an answer with an image. As a control, the same
URLs are sent again without the check of addresses, so that escapes can be seen to be counted.

The last line is the result as JSON. The exit status is 1 if a URL escaped.
"""

import asyncio
import json
import logging
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service import web_images
from tests.hostile_urls import cases, count_escapes


def main() -> int:
    logging.disable()  # every URL is expected to fail
    count = asyncio.run(count_escapes())
    web_images.why_not_public = lambda text: None
    control = asyncio.run(count_escapes())
    for kind, number in Counter(case.name.partition(":")[0] for case in cases()).items():
        escaped = sum(name.startswith(f"{kind}:") for name in count.escaped)
        print(f"{kind:>10}: {number:3} URLs, {escaped} escapes")
    for name in count.escaped:
        print(f"ESCAPED {name}")
    print(f"{count.urls} URLs: {len(count.escaped)} escapes, {len(control.escaped)} without the check of addresses")
    print(json.dumps({"urls": count.urls, "escapes": len(count.escaped), "control": len(control.escaped)}))
    return bool(count.escaped)


if __name__ == "__main__":
    raise SystemExit(main())
