"""What the user says, in words: at least five templates per act, chosen by key. Nothing reads these texts back."""

from __future__ import annotations

from agentgym.seeding import rng
from agentgym_envs.shopping.catalogue import Catalogue, Constraint, Number
from agentgym_envs.shopping.tasks import Brief, Need
from agentgym_envs.shopping.user import Act

TEMPLATES: dict[str, tuple[str, ...]] = {
    "INFORM": (
        "{wish}, please.",
        "I would like {wish}.",
        "It should be {wish}.",
        "Make that {wish}.",
        "For me it has to be {wish}.",
        "{wish} is what I have in mind.",
    ),
    "PREFER": (
        "On {slot}: the {better} the better, but nothing is out.",
        "No fixed {slot}, though I like it {better}.",
        "I have no limit for {slot}; {better} is nicer.",
        "As for {slot}, {better} makes me happier.",
        "{slot}? Rather {better}, if you can.",
    ),
    "NO_PREF": (
        "I don't mind about {slot}.",
        "{slot}? No preference.",
        "Any {slot} is fine.",
        "{slot} does not matter to me.",
        "I have no wish about {slot}.",
    ),
    "VAGUE": (
        "Something sensible for {slot}, you know.",
        "{slot} does matter, nothing extreme.",
        "I do care about {slot}; a reasonable one.",
        "Well, {slot} should be alright.",
        "Not just any {slot}, I have something in mind.",
    ),
    "REJECT": (
        "Not number {position}: I want {wish}.",
        "Number {position} is not for me, it should be {wish}.",
        "Hmm, no to number {position}. I need {wish}.",
        "I will pass on number {position}; I was thinking of {wish}.",
        "Number {position} misses the point: {wish}, please.",
    ),
    "ACCEPT": (
        "Number {position} looks right.",
        "Yes, number {position} would do.",
        "I like number {position}.",
        "Number {position} is what I meant.",
        "Number {position} suits me.",
    ),
    "UNSURE": (
        "I am not sure about number {position}.",
        "Number {position}? Maybe.",
        "Hmm, number {position} leaves me undecided.",
        "Number {position} does not convince me yet.",
        "I cannot say for number {position}.",
    ),
    "CHANGE": (
        "Actually, I changed my mind: {wish}.",
        "On second thought, I want {wish}.",
        "Wait, let us say {wish} instead.",
        "Sorry, I would rather have {wish} after all.",
        "Forget what I had in mind; {wish} now.",
    ),
    "LEAVE": (
        "I have to go. Goodbye.",
        "This takes too long, I am leaving.",
        "Never mind, I will look elsewhere.",
        "That was it for me, bye.",
        "I give up. Have a nice day.",
    ),
    "LISTEN": (
        "Go on.",
        "I see.",
        "Alright.",
        "If you say so.",
        "Okay, I am listening.",
    ),
    "OPEN": (
        "Hello! I am looking for {need}.",
        "Hi, can you help me find {need}?",
        "I need {need}.",
        "Good day. I want to find {need}.",
        "I am after {need}.",
    ),
    "HINT": (
        "The {slot} matters to me.",
        "I care about the {slot}.",
        "Mind the {slot}.",
        "The {slot} should be sensible.",
        "And not just any {slot}.",
    ),
}


class Phrases:
    """The voice of one user: wording hangs on the seed, the act and its slot, and carries no information."""

    def __init__(self, catalogue: Catalogue, seed: int) -> None:
        self.catalogue, self.seed = catalogue, seed

    def opening(self, brief: Brief) -> str:
        """The first message: every need, what is asked of it, and the budget."""
        if len(brief.needs) > 1:
            wants = [f"({i + 1}) {self._need(n)}" for i, n in enumerate(brief.needs)]
            parts = [self._pick("OPEN", "").format(need=" and ".join(wants)), *self._purse(brief)]
        else:
            parts = [self._pick("OPEN", "").format(need=self._need(brief.needs[0])), *self._extras(brief.needs[0])]
        return " ".join(parts)

    def say(self, acts: tuple[Act, ...], round: int) -> str:
        """All acts of one reply as sentences."""
        sentences = [self._act(act, round) for act in acts]
        return " ".join(s[:1].upper() + s[1:] for s in sentences)

    def _pick(self, kind: str, slot: str, round: int = 0) -> str:
        return rng(self.seed, "phrase", kind, slot, round).choice(TEMPLATES[kind])

    def _act(self, act: Act, round: int) -> str:
        kind = "PREFER" if act.wish is not None and act.wish.op == "prefer" else act.kind
        text = self._pick(kind, act.slot, round)
        wish = self.wish(act.wish) if act.wish is not None and act.wish.op != "prefer" else ""
        return text.format(wish=wish, slot=self._label(act.slot), position=act.position, better=self._better(act.slot))

    def _label(self, slot: str) -> str:
        return slot.replace("_", " ")

    def _better(self, slot: str) -> str:
        column = self.catalogue.columns.get(slot)
        return "lower" if column is not None and column.slot.better == "low" else "higher"

    def wish(self, wish: Constraint) -> str:
        """`brand acme`, `price at most 99 eur`."""
        column = self.catalogue.columns[wish.slot]
        if not isinstance(column, Number):
            return f"{self._label(wish.slot)} {wish.value}"
        bound = "at most" if wish.op == "max" else "at least"
        return f"{self._label(wish.slot)} {bound} {float(wish.value):.12g} {column.slot.unit}".rstrip()

    def _need(self, need: Need) -> str:
        rest = [self.wish(c) for c in need.visible if c.slot != "category"]
        what = f"something of the category {need.category}" if need.category else "something"
        return what + (f" with {', '.join(rest)}" if rest else "")

    def _extras(self, need: Need) -> list[str]:
        """What else the user says of a single need: hints, a superlative, the items to choose among."""
        found = [self._pick("HINT", slot).format(slot=self._label(slot)) for slot in need.hints]
        if need.best:
            found.append(f"Of what fits, I want the one with the {self._better(need.best)[:-2]}est {need.best}.")
        if need.among:
            found.append(f"Which of these is right for me: {', '.join(need.among)}?")
        return found

    def _purse(self, brief: Brief) -> list[str]:
        purse = brief.purse
        if purse is None:
            return []
        found = [f"Together they may cost at most {purse.level * purse.items:.2f}."]
        if purse.percent:
            found.append(f"My voucher takes {purse.percent}% off from {purse.threshold * purse.items:.2f} on.")
        return [*found, "Everything must come from one seller."] if purse.one_seller else found
