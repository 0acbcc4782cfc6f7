"""The controller's REST API, as far as setting up needs it."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from typing import Any

from deploy.lib.console import DeployError

REQUEST_TIMEOUT = 70.0
OPERATION_SUCCESS = 200


class ApiError(DeployError):
    """The controller refused; `code` is the HTTP status."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Api:
    """Requests to one controller on this machine, its certificate checked against its own authority."""

    def __init__(self, port: int, certificate: Path, token: str = "") -> None:
        self._port = port
        self._context = ssl.create_default_context(cafile=str(certificate))
        self._token = token

    def get(self, path: str) -> Any:
        """The metadata of a GET."""
        return self._request("GET", path)["metadata"]

    def find(self, path: str) -> Any | None:
        """The metadata of a GET; None where there is nothing."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A change; one that runs in the background is waited for. Returns the metadata; raises when it failed."""
        answer = self._request(method, path, body)
        if answer["type"] == "async":
            return self._wait(answer["operation"])
        return answer["metadata"]

    def _wait(self, operation: str) -> Any:
        done = self.get(f"{operation}/wait?timeout=60")
        if done["status_code"] != OPERATION_SUCCESS:
            raise DeployError(f"{done.get('description', operation)}: {done['status']}: {done.get('err', '')}")
        return done

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self._port, timeout=REQUEST_TIMEOUT, context=self._context
        )
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise DeployError(f"the controller does not answer on port {self._port}: {error}") from None
        except ValueError:
            raise DeployError(f"what answers on port {self._port} is not the controller") from None
        finally:
            connection.close()
        if answer.get("type") == "error":
            raise ApiError(response.status, f"{method} {path}: {answer['error']}")
        return answer
