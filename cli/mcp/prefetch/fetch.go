package prefetch

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"
)

const (
	maxURL       = 2000 // bytes
	maxRedirects = 5
)

// get asks for a file, and gives its content and where it was found. The caller closes the content.
func (f *Fetcher) get(ctx context.Context, where string) (io.ReadCloser, string, error) {
	u, err := checkURL(where)
	if err != nil {
		return nil, "", err
	}
	transport := &http.Transport{
		// No proxy: what it would reach for us can't be told from here.
		DialContext:           (&net.Dialer{Timeout: 20 * time.Second, ControlContext: f.control}).DialContext,
		TLSClientConfig:       &tls.Config{RootCAs: f.Roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   20 * time.Second,
		ResponseHeaderTimeout: 60 * time.Second,
		DisableCompression:    true, // the bytes as they are
		DisableKeepAlives:     true,
		ForceAttemptHTTP2:     true,

		MaxResponseHeaderBytes: 64 << 10,
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		if len(via) > maxRedirects {
			return fmt.Errorf("more than %d redirections", maxRedirects)
		}
		if _, err := checkURL(r.URL.String()); err != nil {
			return fmt.Errorf("it redirects to what is not fetched: %w", err)
		}
		return nil
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, "", err
	}
	r.Header.Set("User-Agent", "nix-infra")
	response, err := client.Do(r)
	if err != nil {
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err
		}
		return nil, "", fmt.Errorf("can't fetch %s: %w", u.Redacted(), err)
	}
	if response.StatusCode != http.StatusOK {
		response.Body.Close()
		return nil, "", fmt.Errorf("can't fetch %s: the server answered %d", response.Request.URL.Redacted(), response.StatusCode)
	}
	return response.Body, response.Request.URL.Redacted(), nil
}

// checkURL takes addresses that begin with https:// and name a host, and nothing that would be sent along.
func checkURL(s string) (*url.URL, error) {
	if len(s) > maxURL {
		return nil, fmt.Errorf("an address may have %d bytes, this one has %d", maxURL, len(s))
	}
	if s == "" || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '\\' }) {
		return nil, fmt.Errorf("%+.100q is no address of a file; expected one such as https://example.org/file.tar.gz", s)
	}
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Opaque != "":
		return nil, fmt.Errorf("%.100q is no address of a file", s)
	case u.Scheme != "https":
		return nil, fmt.Errorf("%.100q: only https:// is fetched", s)
	case u.User != nil:
		return nil, errors.New("the address has a user name or password in it; what is behind a login is not fetched")
	case u.Hostname() == "":
		return nil, fmt.Errorf("%.100q names no host", s)
	}
	u.Fragment = ""
	return u, nil
}

// control judges the address that is about to be connected to: the one that the name led to at this very moment.
func (f *Fetcher) control(_ context.Context, network, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if f.permit != nil {
		return f.permit(at)
	}
	if f.AllowPrivate {
		return nil
	}
	return public(at.Addr())
}

// inner are networks that are not the public internet, beside those that netip tells.
var inner = parsePrefixes(
	"0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
	"::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fec0::/10",
)

var nat64 = netip.MustParsePrefix("64:ff9b::/96")

func parsePrefixes(texts ...string) (all []netip.Prefix) {
	for _, t := range texts {
		all = append(all, netip.MustParsePrefix(t))
	}
	return all
}

// public refuses addresses of this machine and of networks around it, in whatever form they come.
func public(a netip.Addr) error {
	a = a.Unmap().WithZone("")
	if nat64.Contains(a) { // an IPv4 address, as networks without IPv4 have it
		bytes := a.As16()
		return public(netip.AddrFrom4([4]byte(bytes[12:])))
	}
	bad := !a.IsGlobalUnicast() || a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified()
	for _, p := range inner {
		bad = bad || p.Contains(a)
	}
	if bad {
		return fmt.Errorf("%s is not an address of the public internet; the server has to be started with --allow-private for it", a)
	}
	return nil
}
