"""Every claim, in the order in which they run: one module a claim, one line here."""

from benchmarks.claims import saddle_cells
from benchmarks.claims.cell import Claim

CLAIMS: tuple[Claim, ...] = (saddle_cells.CLAIM,)
