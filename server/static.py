"""The files that the page at `GET /` is made of: web/static."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.staticfiles import StaticFiles

# Browsers ask each time whether a file has changed: else a page could run an older one's script.
FRESH = {"Cache-Control": "no-cache"}
LONGEST_PATH = 100  # characters


class PageFiles(StaticFiles):
    """Files that are served fresh."""

    def __init__(self) -> None:
        super().__init__(directory=Path(__file__).parents[1] / "web" / "static")

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        """For a path of thousands of folders, looking it up would take long; none is here."""
        return super().lookup_path(path) if len(path) <= LONGEST_PATH else ("", None)

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(FRESH)
        return response
