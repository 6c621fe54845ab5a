"""The record of a site: all that is said of one place of a composition f(g(x)) in a transformer."""

from dataclasses import dataclass

from torchlamp.rules.none_all import Everything, Nothing
from torchlamp.rules.rule import NumberRule, Rule


@dataclass(frozen=True)
class Place:
    """How a site's modules are found in a model.

    Parameters
    ----------
    parent : str
        ``"attention"`` or ``"mlp"`` of every decoder layer, ``"layer"`` itself, or ``"output"``, the output embedding
        of the model.
    names : tuple of tuples of str
        The children of the parent that form the sums together, by the names that transformers gives them, dots
        included: the first tuple that is there whole. Empty: the parent itself.
    last : bool
        The last projection of its sublayer, which must read what the sublayer computed, and no norm of it.
    """

    parent: str
    names: tuple[tuple[str, ...], ...] = ()
    last: bool = False

    @property
    def in_layers(self) -> bool:
        """Whether every decoder layer has the site; otherwise the model has it once."""
        return self.parent != "output"


@dataclass(frozen=True)
class Look:
    """How a site looks ahead.

    Parameters
    ----------
    composition : str
        What follows the sums, and runs them in the simulation: a name of `huggingface.compositions.COMPOSITIONS`.
    shows : tuple of str
        What rules see there (`Rule.looks_through`) beside what every site shows, "any".
    transforms : tuple of str, optional
        The transforms that are exact there; None: all.
    """

    composition: str
    shows: tuple[str, ...] = ()
    transforms: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Kernel:
    """What the kernel of a site has: integers of so many bits in groups of 32, transforms, and one rule.

    Every kernel runs `none`, those with a rule `all`, too.

    Parameters
    ----------
    form : str, optional
        What decodes the site: a name of `huggingface.decode_plan.FORMS`. None: the kernel of the partner does.
    bits : tuple of int
    rule : NumberRule, optional
        The rule with a threshold that suits most models. None: the copy is read as it is.
    transforms : tuple of str
    """

    form: str | None
    bits: tuple[int, ...]
    rule: NumberRule | None = None
    transforms: tuple[str, ...] = ()

    def has(self, rule: Rule) -> bool:
        """Whether the kernel runs a rule; subclasses are other rules."""
        if self.rule is None:
            return isinstance(rule, Nothing)
        return type(rule) in (Nothing, Everything, type(self.rule))

    def __str__(self) -> str:
        formats = ", ".join(f"int{bits}" for bits in self.bits)
        changes = "".join(f"[.{name}]" for name in self.transforms)
        rules = "no rule" if self.rule is None else f"the rules none, {self.rule.name}:T, all"
        return f"{formats}{' with ' + changes if changes else ''} and {rules}"


@dataclass(frozen=True)
class Site:
    """A place of a composition that policies can name.

    Parameters
    ----------
    name : str
    summary : str
        The numbers that are summed there, in a few words: used in messages and docs.
    place : Place
        How it is found in a model.
    sums : Look
        How it looks ahead, and is simulated, where sums are rounded.
    stored : Look, optional
        The same where an operand is stored and what is repaired is a row or a term that is read in full. None: the
        site has no product of two operands.
    length : str
        What the number of a sum's terms is: a key of `Result.sizes`, or ``"window"``.
    kernel : Kernel, optional
        How it is decoded. None: only in full precision.
    partner : str, optional
        The site that its kernel decodes, too: policies of `prepare` name both, or neither.
    """

    name: str
    summary: str
    place: Place
    sums: Look
    stored: Look | None = None
    length: str = "hidden"
    kernel: Kernel | None = None
    partner: str | None = None

    def look(self, is_stored: bool) -> Look:
        """How the site looks ahead under a stored operand or without one."""
        return self.stored if is_stored and self.stored is not None else self.sums

    def takes(self, transform: str, is_stored: bool) -> bool:
        """Whether a transform is exact at the site, under a stored operand or without one."""
        known = self.look(is_stored).transforms
        return known is None or transform in known
