"""nginx as a plain reverse proxy: the limit, for it neither reads nor counts anything."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bench.candidate import Candidate, Site, printed, run

_CONF = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid nginx.pid;
error_log error.log;

events {{
    worker_connections 9000;
}}

http {{
    access_log off;
    tcp_nodelay on;
    client_max_body_size 32m;
    client_body_buffer_size 128k;
    keepalive_requests 1000000000;
    client_body_temp_path temporary;
    proxy_temp_path temporary;
    fastcgi_temp_path temporary;
    uwsgi_temp_path temporary;
    scgi_temp_path temporary;

    upstream mock {{
        # Twice, for there has to be a next one to go on to.
        server 127.0.0.1:{upstream_port} max_fails=0;
        server 127.0.0.1:{upstream_port} max_fails=0;
        keepalive 512;
        keepalive_requests 1000000000;
    }}

    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://mock;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 600s;
            proxy_next_upstream error timeout http_500 http_502 http_503 non_idempotent;
        }}
    }}
}}
"""


def _binary() -> str | None:
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")


class Nginx(Candidate):
    """Debian's package; one worker."""

    name = "nginx"
    title = "nginx"
    package = "Debian: nginx-light"
    note = "A plain reverse proxy without buffering, one worker, no access log: it checks and counts nothing."

    def version(self, place: Path) -> str | None:
        """Return what it says of itself."""
        del place
        binary = _binary()
        said = binary and printed([binary, "-v"])
        return said.rpartition("/")[2] if said else None

    def install(self, place: Path) -> None:
        """Install Debian's package."""
        del place
        as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        run([*as_root, "apt-get", "install", "-qy", "--no-install-recommends", "nginx-light"])

    def files(self, site: Site) -> dict[str, str]:
        """Return its one file."""
        return {"nginx.conf": _CONF.format(port=site.port, upstream_port=site.upstream_port)}

    def command(self, site: Site) -> list[str]:
        """Return it in the foreground, with its files in its folder."""
        return [_binary() or "nginx", "-p", str(site.directory), "-c", "nginx.conf", "-e", "error.log"]
