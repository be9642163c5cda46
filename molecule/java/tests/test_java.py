"""Java runs, knows the limits of its guest, and trusts what the system trusts."""

from __future__ import annotations

from testinfra.host import Host

# One file, compiled in memory by the runtime itself: no development kit is installed.
PROBE = r"""
import java.security.KeyStore;
import java.security.cert.X509Certificate;
import javax.net.ssl.*;

public class Probe {
  public static void main(String[] args) throws Exception {
    System.out.println("version=" + Runtime.version().feature());
    TrustManagerFactory factory = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
    factory.init((KeyStore) null);
    for (X509Certificate issuer : ((X509TrustManager) factory.getTrustManagers()[0]).getAcceptedIssuers()) {
      System.out.println("trusts=" + issuer.getSubjectX500Principal());
    }
  }
}
"""


def test_java_runs_and_trusts_the_sites_ca(host: Host) -> None:
    release = host.check_output(". /etc/os-release && echo $VERSION_ID")
    host.check_output("printf %%s %s >/tmp/Probe.java", PROBE)
    try:
        said = host.check_output("java /tmp/Probe.java").splitlines()
    finally:
        host.run("rm -f /tmp/Probe.java")
    assert f"version={ {'12': 17, '13': 21}[release] }" in said
    assert "trusts=CN=Clickstream test CA" in said


def test_no_display_libraries_came_along(host: Host) -> None:
    # A server needs the headless runtime only.
    assert host.run("dpkg-query -W libgtk-3-0t64 libgtk-3-0 openjdk-21-jre openjdk-17-jre").stdout == ""
