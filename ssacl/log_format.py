"""Log records for a collector: one JSON object a line."""

from __future__ import annotations

import json
import logging


class JsonLines(logging.Formatter):
    """Names of fields are those of Ray Serve's JSON log, so that one query finds a `request_id` in both."""

    def format(self, record: logging.LogRecord) -> str:
        tree = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "name": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", None):
            tree["request_id"] = request_id
        if record.exc_info:
            tree["exc_text"] = self.formatException(record.exc_info)
        return json.dumps(tree)
