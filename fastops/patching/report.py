"""What patch() and unpatch() say they did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PatchReport:
    """What patch() or unpatch() did, or with ``dry_run`` would do; print it.

    `replaced` holds (module name, before, after) of everything replaced: a module's forward, or what is called in it.
    `left` holds (module name, class, why) of everything that fastops has or could have a counterpart for and did not touch;
    `why` also says what to try. The name of the model itself is "". A module that is in several places goes by its first
    name.
    """

    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        counts: dict[tuple[str, str], int] = {}
        for _, before, after in self.replaced:
            counts[before, after] = counts.get((before, after), 0) + 1
        lines = [f"{before} -> {after}: {n}" for (before, after), n in counts.items()]
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, cls, why in self.left:
            reasons.setdefault((cls, why), []).append(name or "(the model)")
        for (cls, why), names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left {names[0]}{more} ({cls}): {why}")
        return "\n".join(lines) or "nothing to replace"
