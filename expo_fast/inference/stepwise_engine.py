"""What the engines have in common that sample one token of each row at a time."""

from expo_fast.inference.engine import Engine, Rows
from expo_fast.inference.sampling import SampledTokens


class StepwiseEngine(Engine):
    """An engine that samples one token of each loaded row in a call of `decode`, and then stops."""

    rows: Rows | None = None  # that `decode` continues

    def load(self, rows: Rows) -> None:
        self.rows = rows

    def keeps_loaded(self, n_active: int) -> bool:
        return self.rows is not None and n_active == len(self.rows.last_tokens)

    def decode(self, *, ahead: bool) -> SampledTokens:
        rows = self.rows
        assert rows is not None, "decode before load"
        hidden = self.run(rows.tokens())
        rows.positions += 1
        sampled = self.draw(hidden, rows.positions, rows.sampling)
        rows.last_tokens = sampled.tokens
        return SampledTokens(sampled.tokens[None], sampled.logps[None])
