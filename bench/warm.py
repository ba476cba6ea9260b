"""`bench/run warm`: the project's own demo over its emulated WAN, and the times it told. Judges nothing itself.

With loopback addresses and explicit proxies, as the comparison has them: it needs no namespace of its own.
"""

import json

import table
from process import output

# The story takes about half a minute; a slow machine gets more.
SECONDS_MAX = 300


def run(isthmus):
    """`isthmus demo --check`; it ends with everything it started."""
    story = json.loads(output([isthmus, "demo", "--check", "--loopback", "-o", "json"], seconds_max=SECONDS_MAX))
    return {"held": story["held"], "steps": story["steps"]}


def show(found):
    """One row a step of the story."""
    rows = [[step["text"], step["figures"], "held" if step["held"] else "NOT HELD"] for step in found["steps"]]
    return "\n".join(["The demo's story; delays are round trips.", "",
                      *table.markdown(["step", "figures", "verdict"], rows)])
