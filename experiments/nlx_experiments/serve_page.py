# SPDX-License-Identifier: Apache-2.0
"""The page of `nlx serve` as it is answered."""

import hashlib
import pathlib
import re
from base64 import b64encode

from nlx_experiments.serve_http import Reply

PAGE = pathlib.Path(__file__).with_name("serve_page.html")


def page() -> Reply:
    """The page, and the rule that nothing but its own script and style is run."""
    content = PAGE.read_bytes()
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    rules += ["form-action 'none'", "frame-ancestors 'none'"]
    for tag in ("script", "style"):
        inner = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), content, re.DOTALL)
        sums = " ".join(f"'sha256-{b64encode(hashlib.sha256(x).digest()).decode()}'" for x in inner)
        rules.append(f"{tag}-src {sums}")
    return Reply(200, content, "text/html", (("content-security-policy", "; ".join(rules)),))
