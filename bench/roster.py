"""All candidates."""

from __future__ import annotations

from bench.candidate import Candidate
from bench.candidates.bifrost import Bifrost
from bench.candidates.crabllm import Crabllm, CrabllmStored
from bench.candidates.crabtwist import Bare, Everything, Extended, Unextended
from bench.candidates.direct import Direct
from bench.candidates.litellm import LiteLLM
from bench.candidates.nginx import Nginx
from bench.candidates.portkey import Portkey

CANDIDATES: tuple[Candidate, ...] = (
    Direct(),
    Nginx(),
    Everything(),
    Extended(),
    Unextended(),
    Bare(),
    Crabllm(),
    CrabllmStored(),
    Bifrost(),
    Portkey(),
    LiteLLM(),
)

#: In a quick run: what is there without an installation that takes long.
QUICK = ("direct", "nginx", "everything", "bare")
