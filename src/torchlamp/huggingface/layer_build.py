"""One decoder layer while a policy's forwards are built for it: what its sites ask for and share."""

from torch import nn

from torchlamp.huggingface.attached_policy import AttachedPolicy
from torchlamp.huggingface.site_forwards import Forward, LinearGroup, NormForward, Residual, group_forwards
from torchlamp.huggingface.sites import Sites
from torchlamp.policy.policy import SitePolicy
from torchlamp.policy.site import Site
from torchlamp.simulation.stored_mlp import OutputSize


class LayerBuild:
    """A decoder layer, or what the model has once, under construction.

    Parameters
    ----------
    sites : Sites
    attached : AttachedPolicy
    number : int
        Of the layer; -1 for what the model has once.
    module : nn.Module
        The layer, or the model.
    """

    def __init__(self, sites: Sites, attached: AttachedPolicy, number: int, module: nn.Module) -> None:
        self.sites, self.attached, self.number, self.module = sites, attached, number, module
        #: What runs there.
        self.policies: dict[str, SitePolicy] = {
            site: policy
            for site in attached.policies
            if (policy := attached.policy(site, number)) is not None
        }
        self.forwards: list[Forward] = []
        self._sites: dict[nn.Module, str] = {}
        #: What the norms' sums run under; None: float32.
        self.norm_policy: SitePolicy | None = None
        #: The size of the MLP's output, from its up projection to its down projection if that is stored.
        self.size = OutputSize()
        self._streams: dict[str, Residual] = {}

    def install(self, site: Site, group: LinearGroup) -> None:
        """Put a site's modules into a group."""
        modules = self.sites.modules(site, self.module)
        for module in modules:
            self.sites.weights(module)  # refuses what can't run
            self.sites.check_free(module, self._sites.setdefault(module, site.name), site.name)
        self.forwards += group_forwards(modules, group)

    def residual(self, sublayer: str) -> Residual:
        """The residual stream in front of a sublayer, "attention" or "mlp", whose first norm notes it."""
        return self._streams.setdefault(sublayer, Residual())

    def norm_after(self, sublayer: str) -> tuple[str, nn.Module] | None:
        """The norm that reads what a sublayer gives, before that is added to the stream; None: there is none."""
        norms = self.sites.norms(self.module)
        return norms.after_attention if sublayer == "attention" else norms.after_mlp

    def next_norm(self, sublayer: str) -> nn.Module:
        """The norm that reads the stream next."""
        if sublayer == "attention":
            return self.sites.norms(self.module).mlp[1]
        if self.number + 1 == len(self.sites.layers):
            return self.sites.final_norm()
        return self.sites.norms(self.sites.layers[self.number + 1]).attention[1]

    def softcap(self, site: Site) -> float | None:
        """The softcap of the logits that a site forms; None: none."""
        return None if site.place.in_layers else self.sites.lm_head()[1]

    def finish(self) -> list[Forward]:
        """The forwards, with those of the norms that note the stream or read rounded sums."""
        if self.norm_policy is None and not self._streams:
            return self.forwards
        norms = self.sites.norms(self.module)
        for sublayer, module in (("attention", norms.attention[1]), ("mlp", norms.mlp[1])):
            if self.norm_policy is not None or sublayer in self._streams:
                self._norm(module, self._streams.get(sublayer), f"/{sublayer}")
        if self.norm_policy is not None and self.number + 1 == len(self.sites.layers):
            self._norm(self.sites.final_norm(), None, "/final")
        return self.forwards

    def _norm(self, module: nn.Module, stream: Residual | None, place: str) -> None:
        norm, policy = self.sites.norm(module), self.norm_policy
        self.forwards.append(NormForward(module, self.attached, self.number, norm, policy, stream, place))
