"""TLS, and in what words a connection failed."""

from __future__ import annotations

import ssl

from edgelm.config import BrokerConfig
from edgelm.errors import EdgelmError


def tls_context(broker: BrokerConfig) -> ssl.SSLContext:
    """Return a context that trusts the given CA; raise `EdgelmError` for a file that holds no certificate or key."""
    try:
        context = ssl.create_default_context(cafile=broker.cafile)
        if broker.certfile:
            context.load_cert_chain(broker.certfile, broker.keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise EdgelmError(f"cafile, certfile, keyfile: not a usable certificate or key: {error}") from error
    return context


def reason_of(error: BaseException | None) -> str:
    """Return why a connection failed, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return "unknown reason"
