"""A run's status for people: a few lines, the same on a terminal and in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from grid.schema.status import STATUS_WORDS
from victims.errors import counted


def status_words(found: Mapping[str, Any]) -> str:
    """What `grid status` prints."""
    return "\n".join(_lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['grid']} ({found['hash']}): {driver_words(found)}"
    cells = [f"{n} {STATUS_WORDS.get(state, state)}" for state, n in found["cells"].items()]
    yield f"cells: {', '.join(cells)}; {found['planned']} planned"
    for why, number in found["waiting"].items():
        yield f"of the missing, {counted(number, 'cell')}: {why}"
    stages = found["stages"]
    if stages.get("planned") is not None:
        hits = ""
        if stages["found_share"] is not None:
            reuse = f"{stages['found_share']:.0%} reuse"
            hits = f"; {stages['found']} more found in the store ({reuse})"
        elsewhere = stages.get("made_by_another_run")
        others = f"; another run makes {elsewhere}" if elsewhere else ""
        to_make = f"{stages['done']} of {stages['planned']} to make are done"
        yield f"stages: {to_make if stages['planned'] else 'none to make'}{hits}{others}"
    yield from _time(found)
    for stage in found["running"]:
        yield _running(stage)
    if not found["running"] and found["state"] == "running":
        yield "running: nothing yet"
    for request in found["requests"]:
        yield f"asked for, not done yet: {request['verb']} {request['only']}".rstrip()
    if found["slowest"]:
        listed = [f"{cell['label']} {duration(cell['seconds'])}" for cell in found["slowest"]]
        yield f"slowest cells: {', '.join(listed)}"


def driver_words(found: Mapping[str, Any], command: str = "grid run") -> str:
    """Who works on a results directory, or what became of it; ``command`` goes on with it."""
    driver = found["driver"]
    if driver is None:
        return str(found["state"])
    who = f"process {driver['pid']} on {driver['host']}"
    ago = f"{duration(driver['silent_seconds'])} ago"
    state, why = found["state"], f": {found['why']}" if found["why"] else ""
    if state == "died":
        return (
            f"{who} died without a word, which it last gave {ago}; `{command}` goes on where it"
            " stopped"
        )
    if state in ("ended", "stopped"):
        paused = ""
        if found.get("paused"):
            paused = "; paused: a new run starts nothing until `grid resume`"
        return f"{state} {ago}{why}{paused}"
    paused = "; nothing new starts until `grid resume`" if state == "paused" else ""
    return f"{state}, {who}, {counted(found['lanes'], 'lane')}, heard {ago}{paused}"


def _time(found: Mapping[str, Any]) -> Iterator[str]:
    seconds = found["seconds"]
    parts = [f"{_hours(seconds['used'])} of stages so far ({_hours(seconds['training'])} training"]
    lost = f", {_hours(seconds['lost'])} of attempts that failed" if seconds["lost"] else ""
    parts[0] += f", {_hours(seconds['gpu_used'])} on GPUs{lost})"
    if seconds["left"]:
        parts.append(f"{_hours(seconds['left'])} to go ({_hours(seconds['gpu_left'])} on GPUs)")
        if found["state"] == "running":
            parts.append(f"done in about {duration(seconds['eta'])}")
    yield f"time: {'; '.join(parts)}"


def _running(stage: Mapping[str, Any]) -> str:
    about = f"{stage['kind']} {stage['key']} {stage['name']}"
    if not stage["has_begun"]:
        return f"submitted: {about}, waits for a place"
    took = f"{duration(stage['seconds'])} of about {duration(stage['expected_seconds'])}"
    cells = ", ".join(stage["cells"])
    more = stage["num_cells"] - len(stage["cells"])
    behind = f", for {cells}{f' and {more} more' if more > 0 else ''}" if cells else ""
    quiet = ""
    if stage["is_stalled"]:
        quiet = f"; STALLED: no line in its log for {duration(stage['quiet_seconds'])}"
        quiet += f" ({stage['log']})" if stage["log"] else ""
    return f"running: {about}, {took}{behind}{quiet}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h" if seconds >= 360 else f"{seconds:.3g} s"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 or not seconds else f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:,.1f} days"
