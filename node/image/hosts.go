package image

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// The form of the directory is containerd's: github.com/containerd/containerd, docs/hosts.md. Its own reader takes a file that it cannot
// read for one that is not there, and asks the registry which a mirror was meant to stand for; ours says what is wrong.
const (
	// hostsFile is the file in a registry's directory.
	hostsFile = "hosts.toml"
	// anyRegistry is the directory of registries that have none of their own.
	anyRegistry = "_default"
	// hostKey is the key of the mirrors' tables in the file.
	hostKey = "host"
)

// endpoint is a registry, or a mirror of one.
type endpoint struct {
	url          *url.URL // its path is the root of the API
	capabilities docker.HostCapabilities
	tls          *tls.Config
	header       http.Header
	dialTimeout  time.Duration
	// own: it is the registry in the image's name.
	own bool
	// plainToo: where it speaks no TLS it is asked without.
	plainToo bool
}

// hostTable is what the file says of one endpoint.
type hostTable struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`     // a file, or a list of such
	Client       any            `toml:"client"` // a file of certificate and key, or a list of such or of pairs
	SkipVerify   *bool          `toml:"skip_verify"`
	OverridePath bool           `toml:"override_path"`
	Header       map[string]any `toml:"header"` // a text, or a list of such
	DialTimeout  string         `toml:"dial_timeout"`
}

// hostsConfig is the file. The table of the top is the server's.
type hostsConfig struct {
	hostTable
	Server string               `toml:"server"`
	Hosts  map[string]hostTable `toml:"host"`
}

// keyError is what is wrong with one key of the file.
type keyError struct {
	key string
	err error
}

func (e *keyError) Error() string { return e.key + ": " + e.err.Error() }
func (e *keyError) Unwrap() error { return e.err }

func badKey(key, format string, args ...any) error {
	return &keyError{key, fmt.Errorf(format, args...)}
}

// endpointsOf reads from the directory root whom to ask for images of a registry (the host of their names), in turn. The registry itself is
// the last one, unless the file names another server. A directory that is not there says nothing.
func endpointsOf(root, registry string) ([]endpoint, error) {
	dir, err := hostsDir(root, registry)
	if err != nil {
		return nil, err
	}
	var c hostsConfig
	var order []string
	file := filepath.Join(dir, hostsFile)
	raw, err := os.ReadFile(file)
	switch {
	case dir == "":
	case errors.Is(err, fs.ErrNotExist):
		c.hostTable, err = dockersFiles(dir)
		if err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	default:
		if c, order, err = parseHosts(raw); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
	}
	list, err := c.endpoints(dir, registry, order)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return list, nil
}

// hostsDir is the directory of a registry, or nothing. ":5000" may be written "_5000_" in its name.
func hostsDir(root, registry string) (string, error) {
	if root == "" {
		return "", nil
	}
	names := []string{registry, anyRegistry}
	if i := strings.LastIndex(registry, ":"); i > 0 {
		names = slices.Insert(names, 0, registry[:i]+"_"+registry[i+1:]+"_")
	}
	for _, n := range names {
		dir := filepath.Join(root, n)
		if _, err := os.Stat(dir); err == nil {
			return dir, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", nil
}

// dockersFiles is the older form, docker's: authorities are *.crt, client certificates *.cert with their keys in *.key.
func dockersFiles(dir string) (hostTable, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return hostTable{}, err
	}
	var ca, client []any
	for _, e := range entries {
		name := e.Name()
		switch base, isCert := strings.CutSuffix(name, ".cert"); {
		case e.IsDir():
		case strings.HasSuffix(name, ".crt"):
			ca = append(ca, name)
		case isCert && slices.ContainsFunc(entries, func(k fs.DirEntry) bool { return k.Name() == base+".key" }):
			client = append(client, []any{name, base + ".key"})
		case isCert:
			client = append(client, name)
		}
	}
	t := hostTable{}
	if ca != nil {
		t.CA = ca
	}
	if client != nil {
		t.Client = client
	}
	return t, nil
}

// parseHosts also returns the URLs of the mirrors in the order of the file, which is that in which they are asked.
func parseHosts(raw []byte) (hostsConfig, []string, error) {
	var c hostsConfig
	if err := toml.NewDecoder(bytes.NewReader(raw)).DisallowUnknownFields().Decode(&c); err != nil {
		return c, nil, describeTOML(err)
	}
	var order []string
	p := unstable.Parser{}
	p.Reset(raw)
	table := false // before the first table, keys are those of the top
	for p.NextExpression() {
		e := p.Expression()
		if table = table || e.Kind == unstable.Table; table && e.Kind != unstable.Table {
			continue
		}
		var parts []string
		for k := e.Key(); k.Next(); {
			parts = append(parts, string(k.Node().Data))
		}
		if len(parts) > 1 && parts[0] == hostKey && !slices.Contains(order, parts[1]) {
			order = append(order, parts[1])
		}
	}
	for h := range c.Hosts {
		if !slices.Contains(order, h) {
			return c, nil, badKey(keyOf(hostKey, h), "write it as a table of its own, [%s]: mirrors are asked in the order of their tables", keyOf(hostKey, h))
		}
	}
	return c, order, nil
}

// describeTOML says in one line which key is wrong, and where.
func describeTOML(err error) error {
	var missing *toml.StrictMissingError
	var bad *toml.DecodeError
	switch {
	case errors.As(err, &missing) && len(missing.Errors) > 0:
		row, _ := missing.Errors[0].Position()
		return badKey(keyOf(missing.Errors[0].Key()...), "line %d: there is no such key", row)
	case errors.As(err, &bad):
		row, column := bad.Position()
		at := fmt.Errorf("line %d, column %d: %w", row, column, err)
		if len(bad.Key()) == 0 {
			return at
		}
		return &keyError{keyOf(bad.Key()...), at}
	}
	return err
}

// keyOf writes a key as the file has it.
func keyOf(parts ...string) string {
	out := make([]string, len(parts))
	for i, p := range parts {
		if out[i] = p; strings.ContainsAny(p, ":/.") {
			out[i] = `"` + p + `"`
		}
	}
	return strings.Join(out, ".")
}

// endpoints are the mirrors, then the registry.
func (c hostsConfig) endpoints(dir, registry string, order []string) ([]endpoint, error) {
	var list []endpoint
	for _, h := range order {
		e, err := c.Hosts[h].endpoint(dir, registry, keyOf(hostKey, h), h)
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	if c.Server == "" {
		c.Capabilities = nil // they are those of a server that the file names
	}
	e, err := c.endpoint(dir, registry, "", cmp.Or(c.Server, "https://"+registry))
	if err != nil {
		return nil, err
	}
	e.plainToo = e.plainToo || c.Server == "" && docker.IsLocalhost(registry)
	return append(list, e), nil
}

// endpoint turns the table at key ("": the top) into what at, a URL or a host, is asked with.
func (t hostTable) endpoint(dir, registry, key, at string) (endpoint, error) {
	e := endpoint{}
	within := func(name string) string { return strings.TrimPrefix(key+"."+name, ".") }
	var err error
	if e.url, err = t.parseURL(at); err != nil {
		what := "server"
		if key != "" {
			what = hostKey // without the URL, which may have a password; the error has it without
		}
		return e, &keyError{what, err}
	}
	if e.capabilities, err = t.capabilities(); err != nil {
		return e, &keyError{within("capabilities"), err}
	}
	e.tls = &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: t.SkipVerify != nil && *t.SkipVerify}
	if e.tls.RootCAs, err = t.authorities(dir); err != nil {
		return e, &keyError{within("ca"), err}
	}
	if e.tls.Certificates, err = t.certificates(dir); err != nil {
		return e, &keyError{within("client"), err}
	}
	if e.header, err = t.headers(); err != nil {
		return e, &keyError{within("header"), err}
	}
	if e.dialTimeout = dialTimeout; t.DialTimeout != "" {
		if e.dialTimeout, err = time.ParseDuration(t.DialTimeout); err != nil || e.dialTimeout <= 0 {
			return e, badKey(within("dial_timeout"), "%q is not a time such as 5s", t.DialTimeout)
		}
	}
	e.own = e.url.Host == registry || registry == dockerHub && e.url.Host == dockerHubHost
	// As containerd does: who says anything of TLS for a plain address has it tried first.
	saysTLS := t.CA != nil || t.Client != nil || t.SkipVerify != nil
	if _, port, _ := net.SplitHostPort(e.url.Host); e.url.Scheme == "http" && saysTLS && port != "" && port != "80" {
		e.url.Scheme, e.plainToo = "https", true
	}
	return e, nil
}

func (t hostTable) parseURL(at string) (*url.URL, error) {
	if !strings.Contains(at, "://") {
		at = "https://" + at
	}
	u, err := url.Parse(at)
	switch {
	case err != nil:
		var bad *url.Error
		if errors.As(err, &bad) {
			err = bad.Err
		}
		return nil, fmt.Errorf("not a URL: %w", err)
	case u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("%q must be http://host or https://host", at)
	case u.User != nil:
		return nil, fmt.Errorf("%q must not have a user: give [host.%q.header] an Authorization", u.Redacted(), u.Scheme+"://"+u.Host)
	}
	if u.Host == dockerHub {
		u.Host = dockerHubHost
	}
	if u.Path != "" {
		u.Path = path.Clean(u.Path)
	}
	if !t.OverridePath && !strings.HasSuffix(u.Path, "/v2") {
		u.Path = strings.TrimSuffix(u.Path, "/") + "/v2"
	}
	return u, nil
}

func (t hostTable) capabilities() (docker.HostCapabilities, error) {
	known := map[string]docker.HostCapabilities{"pull": docker.HostCapabilityPull, "resolve": docker.HostCapabilityResolve,
		"push": docker.HostCapabilityPush, "referrers": docker.HostCapabilityReferrers}
	if len(t.Capabilities) == 0 {
		return docker.HostCapabilityPull | docker.HostCapabilityResolve, nil
	}
	var all docker.HostCapabilities
	for _, name := range t.Capabilities {
		one, ok := known[strings.ToLower(name)]
		if !ok {
			return 0, fmt.Errorf("%q is not one of %s", name, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
		all |= one
	}
	return all, nil
}

func (t hostTable) authorities(dir string) (*x509.CertPool, error) {
	files, err := texts(t.CA)
	if err != nil || len(files) == 0 {
		return nil, err
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	for _, f := range files {
		raw, err := os.ReadFile(inDir(dir, f))
		if err != nil {
			return nil, err
		}
		if !pool.AppendCertsFromPEM(raw) {
			return nil, fmt.Errorf("%s has no PEM certificate", inDir(dir, f))
		}
	}
	return pool, nil
}

func (t hostTable) certificates(dir string) ([]tls.Certificate, error) {
	entries, isList := t.Client.([]any)
	if t.Client != nil && !isList {
		entries = []any{t.Client}
	}
	var out []tls.Certificate
	for _, e := range entries {
		pair, err := texts(e)
		if err != nil || len(pair) < 1 || len(pair) > 2 {
			return nil, fmt.Errorf("%v must be a file with certificate and key, or a pair of a certificate and its key", e)
		}
		cert, err := tls.LoadX509KeyPair(inDir(dir, pair[0]), inDir(dir, pair[len(pair)-1]))
		if err != nil {
			return nil, err
		}
		out = append(out, cert)
	}
	return out, nil
}

func (t hostTable) headers() (http.Header, error) {
	h := http.Header{}
	for name, v := range t.Header {
		values, err := texts(v)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		h[http.CanonicalHeaderKey(name)] = values
	}
	return h, nil
}

// texts is a text or a list of such; nil has none.
func texts(v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		var out []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("%v is not a text in quotes", e)
			}
			out = append(out, s)
		}
		return out, nil
	}
	return nil, fmt.Errorf("%v is neither a text in quotes nor a list of such", v)
}

// inDir is a file of the registry's directory.
func inDir(dir, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(dir, name)
}
