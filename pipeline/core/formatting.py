"""Numbers as text for people."""


def clock(seconds: float) -> str:
    """Return a duration as text: "48 s", "7 min 03 s", "3 h 20 min"."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
