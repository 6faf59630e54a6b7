package mcp

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// HTTPOptions is how a server is reached over HTTP.
type HTTPOptions struct {
	Addr            string   // host:port; without a host, this machine alone reaches it
	TLSCert, TLSKey string   // files; needed where others reach it
	Origins         []string // of web pages that may speak with it, such as https://chat.example.org; none: no page
	Authenticate    func(token string) (Caller, error)
	listening       func(net.Addr) // told where it listens, for tests
}

// Path is where the protocol is spoken.
const Path = "/mcp"

// Bounds of HTTP.
const (
	maxAtOnce   = 64 // requests that are worked on at the same time, and as many that listen
	maxOfCaller = 16 // of them, of one caller
	maxRefusals = 60 // that are logged in a minute; the rest is counted: whoever has no token can't fill a disk
	sessionIdle = 30 * time.Minute
)

// Check refuses options by which others than this machine could read what is said.
func (o *HTTPOptions) Check() error {
	host, port, err := net.SplitHostPort(o.Addr)
	if err != nil {
		return fmt.Errorf("--http %q: use HOST:PORT, such as 127.0.0.1:8787 or :8787", o.Addr)
	}
	if host == "" {
		host = "127.0.0.1"
		o.Addr = net.JoinHostPort(host, port)
	}
	for _, origin := range o.Origins {
		if u, err := url.Parse(origin); err != nil || u.Host == "" || u.Scheme+"://"+u.Host != origin {
			return fmt.Errorf("--allow-origin %q: use SCHEME://HOST, such as https://chat.example.org", origin)
		}
	}
	if (o.TLSCert == "") != (o.TLSKey == "") {
		return errors.New("--tls-cert and --tls-key go together")
	}
	if ip, err := netip.ParseAddr(host); (err == nil && ip.IsLoopback() || host == "localhost") || o.TLSCert != "" {
		return nil
	}
	return fmt.Errorf("--http %s: other machines could reach it, and tokens would travel in clear; give --tls-cert and --tls-key, or put a proxy with TLS before a loopback address", o.Addr)
}

// ServeHTTP speaks with many clients by streamable HTTP, until ctx ends.
func (s *Server) ServeHTTP(ctx context.Context, o HTTPOptions) error {
	if err := o.Check(); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", o.Addr)
	if err != nil {
		return err
	}
	sessions := newSessions()
	streamable := server.NewStreamableHTTPServer(s.mcp,
		server.WithSessionIdManagerResolver(sessions), // revisions before 2026-07-28 ask people within a session
		server.WithSessionIdleTTL(sessionIdle),
		server.WithStreamableHTTPLogger(slog.New(slog.DiscardHandler)),
		server.WithStreamableHTTPCORS(server.WithCORSAllowedOrigins(o.Origins...), server.WithCORSAllowedHeaders("Authorization", "Content-Type", "Accept", "Last-Event-ID",
			server.HeaderKeySessionID, mcp.HeaderProtocolVersion, mcp.HeaderMethod, mcp.HeaderName)),
	)
	h := &http.Server{
		Handler: s.guard(o, sessions, streamable), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog:    slog.NewLogLogger(s.Log.Handler(), slog.LevelWarn),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	if o.TLSCert != "" {
		pair, err := tls.LoadX509KeyPair(o.TLSCert, o.TLSKey)
		if err != nil {
			listener.Close()
			return fmt.Errorf("--tls-cert, --tls-key: %w", err)
		}
		listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12})
	}
	s.Log.Info("listening", "address", listener.Addr().String(), "path", Path, "tls", o.TLSCert != "")
	if o.listening != nil {
		o.listening(listener.Addr())
	}
	stop := context.AfterFunc(ctx, func() { h.Close() }) // what is worked on ends with ctx
	defer stop()
	err = h.Serve(listener)
	_ = streamable.Shutdown(context.WithoutCancel(ctx))
	if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
		return nil
	}
	return err
}

// guard lets in what has a token, and no web page that was not named. It tells the server who asks.
func (s *Server) guard(o HTTPOptions, sessions *sessions, next http.Handler) http.Handler {
	var working, listening places
	var logged refusals
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != Path {
			http.NotFound(w, r)
			return
		}
		// A browser says on behalf of which page it asks. Whoever else asks says nothing there.
		if origin := r.Header.Values("Origin"); len(origin) > 1 || len(origin) == 1 && !slices.Contains(o.Origins, origin[0]) {
			logged.log(s.Log, time.Now(), "refused: origin", "origin", cut(fmt.Sprint(origin), 200), "from", r.RemoteAddr)
			http.Error(w, "this origin may not speak with this server", http.StatusForbidden)
			return
		}
		if r.Method == http.MethodOptions && r.Header.Get("Origin") != "" { // a browser that asks whether it may ask, which has no token
			next.ServeHTTP(w, r)
			return
		}
		token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		caller, err := Caller{}, errors.New("no bearer token")
		if ok {
			caller, err = o.Authenticate(token)
		}
		if err != nil {
			logged.log(s.Log, time.Now(), "refused: token", "why", err, "from", r.RemoteAddr)
			w.Header().Set("WWW-Authenticate", `Bearer realm="nix-infra"`)
			http.Error(w, "a valid token is needed: Authorization: Bearer TOKEN", http.StatusUnauthorized)
			return
		}
		if !sessions.admits(w, r, caller) {
			return
		}
		at := &working
		if r.Method == http.MethodGet {
			at = &listening
		}
		leave, ok := at.take(caller)
		if !ok {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "too many requests are worked on", http.StatusServiceUnavailable)
			return
		}
		defer leave()
		r.Body = http.MaxBytesReader(w, r.Body, maxMessage)
		next.ServeHTTP(w, r.WithContext(withCaller(r.Context(), caller)))
	})
}

// refusals are those of who may not come in.
type refusals struct {
	mu     sync.Mutex
	minute int64
	n      int // in that minute
}

func (r *refusals) log(to *slog.Logger, now time.Time, what string, about ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if minute := now.Unix() / 60; minute != r.minute {
		if r.n > maxRefusals {
			to.Warn("more were refused than were logged", "more", r.n-maxRefusals)
		}
		r.minute, r.n = minute, 0
	}
	if r.n++; r.n <= maxRefusals {
		to.Warn(what, about...)
	}
}

// places are for so many requests at the same time, of which one caller has a share at most.
type places struct {
	mu  sync.Mutex
	all int
	of  map[Caller]int
}

// take takes a place, until leave is called.
func (p *places) take(caller Caller) (leave func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all >= maxAtOnce || p.of[caller] >= maxOfCaller {
		return nil, false
	}
	if p.of == nil {
		p.of = map[Caller]int{}
	}
	p.all++
	p.of[caller]++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.all--
		if p.of[caller]--; p.of[caller] == 0 {
			delete(p.of, caller)
		}
	}, true
}
