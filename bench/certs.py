"""Certificates of the Envoy chains: one root, a leaf a proxy with its SPIFFE URI, ECDSA P-256. By openssl."""

import pathlib

from process import output

TRUST_DOMAIN = "bench"
# Envoy's QUIC client compares the SNI with DNS names, beside the URI that we ask for.
SERVER_NAME = "cart.shop.svc.clusterset.local"


def identity(name):
    """The URI of a leaf."""
    return f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/{name}"


class Authority:
    """A root whose files are in `folder`."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True)
        self.root = self.folder / "root.pem"
        self._key = self.folder / "root.key"
        output(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-keyout", self._key, "-out", self.root, "-days", "2", "-subj", "/CN=bench root",
                "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"])

    def leaf(self, name):
        """Issues a leaf; returns the paths of its certificate and its key."""
        key, request, certificate, extensions = (
            self.folder / f"{name}.{suffix}" for suffix in ("key", "csr", "pem", "ext")
        )
        extensions.write_text(
            f"subjectAltName=critical,URI:{identity(name)},DNS:{SERVER_NAME}\n"
            "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
            "extendedKeyUsage=serverAuth,clientAuth\n"
        )
        output(["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-keyout", key, "-out", request, "-subj", f"/CN={name}"])
        output(["openssl", "x509", "-req", "-in", request, "-CA", self.root, "-CAkey", self._key, "-CAcreateserial",
                "-out", certificate, "-days", "2", "-extfile", extensions])
        return certificate, key
