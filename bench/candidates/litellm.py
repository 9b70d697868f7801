"""LiteLLM's proxy, one worker, as its page on production says."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.candidate import CLIENT_KEY, UPSTREAM_KEY, Candidate, Site, printed, run

_CONFIG = """\
model_list:
  - model_name: bench-claude
    litellm_params:
      model: anthropic/bench-claude
      api_base: {upstream}
      api_key: {upstream_key}
  - model_name: bench-gpt
    litellm_params:
      model: openai/bench-gpt
      api_base: {upstream}/v1
      api_key: {upstream_key}

litellm_settings:
  num_retries: 2
  request_timeout: 600
  set_verbose: false
  json_logs: true

general_settings:
  master_key: {client_key}
"""


class LiteLLM(Candidate):
    """From PyPI, in a virtual environment of its own."""

    name = "litellm"
    title = "LiteLLM"
    package = "PyPI: litellm[proxy]"
    note = "One worker, no database: no spend is recorded, no limits are checked but the master key."

    def version(self, place: Path) -> str | None:
        """Return what is installed."""
        line = "from importlib.metadata import version; print(version('litellm'))"
        return printed([str(place / "bin" / "python"), "-c", line])

    def install(self, place: Path) -> None:
        """Make a virtual environment and install it there."""
        run([sys.executable, "-m", "venv", str(place)])
        run([str(place / "bin" / "pip"), "install", "-q", self.package.partition(" ")[2]])

    def files(self, site: Site) -> dict[str, str]:
        """Return its one file."""
        config = _CONFIG.format(upstream=site.upstream, upstream_key=UPSTREAM_KEY, client_key=CLIENT_KEY)
        return {"config.yaml": config}

    def command(self, site: Site) -> list[str]:
        """Return it with one worker."""
        litellm = str(site.place / "bin" / "litellm")
        where = ["--host", "127.0.0.1", "--port", str(site.port)]
        return [litellm, "--config", "config.yaml", "--num_workers", "1", "--telemetry", "False", *where]

    def environ(self, site: Site) -> dict[str, str]:
        """Return what its page on production asks for, and prices without a download."""
        del site
        return {
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
