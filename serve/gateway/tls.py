"""TLS contexts of the gateway, as a server and as a client."""

from __future__ import annotations

import ssl

from serve.gateway.config import ClientTls, ServerTls
from ssacl.errors import ConfigError


def server_context(tls: ServerTls) -> ssl.SSLContext:
    """
    Raises
    ------
    ConfigError
        A file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(tls.certificate, tls.private_key)
        if tls.client_ca:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise ConfigError("The TLS certificate, key or client_ca cannot be read. Give PEM files that this user may read.") from error
    return context


def client_context(tls: ClientTls) -> ssl.SSLContext:
    """
    Raises
    ------
    ConfigError
        A file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.certificate:
            context.load_cert_chain(tls.certificate, tls.private_key)
    except OSError as error:
        raise ConfigError("A TLS file of a destination cannot be read. Give PEM files that this user may read.") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
