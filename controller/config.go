package controller

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// DefaultDir is where a controller keeps its state unless told otherwise.
const DefaultDir = "/var/lib/nix-infra-controller"

// Config is controller.yaml. The controller's name is not in it: that comes from the enrolment.
type Config struct {
	Dir string `yaml:"-"`

	Broker    BrokerConfig    `yaml:"broker"`
	Etcd      EtcdConfig      `yaml:"etcd"`
	Heartbeat HeartbeatConfig `yaml:"heartbeat"`
	Blobs     BlobsConfig     `yaml:"blobs"`
}

// BrokerConfig says where the embedded broker listens, or which other one to use.
type BrokerConfig struct {
	Listen         string   `yaml:"listen"`          // host:port for TLS; port 0 is any free one
	Websocket      string   `yaml:"websocket"`       // host:port for secure websockets; "" disables
	External       []string `yaml:"external"`        // tls:// and wss:// URLs of another broker; then none is started
	MaxConnections int      `yaml:"max_connections"` // 0: 65536
}

// EtcdConfig says which etcd to use, if not the embedded one.
type EtcdConfig struct {
	External EtcdExternal `yaml:"external"`
}

// EtcdExternal is an etcd that somebody else runs. The files are PEM.
type EtcdExternal struct {
	Endpoints []string `yaml:"endpoints"` // URLs
	CA        string   `yaml:"ca"`
	Cert      string   `yaml:"cert"`
	Key       string   `yaml:"key"`
}

// HeartbeatConfig is about nodes that beat.
type HeartbeatConfig struct {
	Interval int `yaml:"interval"` // seconds, for nodes that don't say when their next beat is due
}

// BlobsConfig is about what was uploaded.
type BlobsConfig struct {
	MaxBytes int64 `yaml:"max_bytes"` // of all blobs together, compressed; 0: as the disk allows
}

// DefaultConfig is the configuration of a controller with no file.
func DefaultConfig(dir string) Config {
	c := Config{Dir: dir}
	c.Broker.Listen = "0.0.0.0:4222"
	c.Broker.Websocket = "0.0.0.0:443"
	c.Heartbeat.Interval = 10
	return c
}

// LoadConfig reads a configuration file. With an empty path it is dir/controller.yaml, which may be missing.
func LoadConfig(path, dir string) (Config, error) {
	c := DefaultConfig(dir)
	named := path != ""
	if !named {
		path = filepath.Join(dir, "controller.yaml")
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return c, nil
	} else if err != nil {
		return c, fmt.Errorf("can't read the configuration: %w", err)
	}
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return c, fmt.Errorf("%s: %s", path, oneLine(err))
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// goType is what a message of the decoder ends with.
var goType = regexp.MustCompile(` (in type|into) \S+`)

// oneLine drops the decoder's heading and its talk of Go types; what stays is "line 3: field x not found".
func oneLine(err error) string {
	var lines []string
	for _, l := range strings.Split(strings.TrimPrefix(err.Error(), "yaml: "), "\n") {
		if l = strings.TrimSpace(l); l != "" && l != "unmarshal errors:" {
			lines = append(lines, goType.ReplaceAllString(l, ""))
		}
	}
	return strings.Join(lines, "; ")
}

func (c *Config) check() error {
	e := c.Etcd.External
	switch {
	case c.Broker.Listen == "" && len(c.Broker.External) == 0:
		return errors.New("broker.listen is empty; give host:port, such as 0.0.0.0:4222")
	case c.Broker.MaxConnections < 0:
		return errors.New("broker.max_connections is negative")
	case c.Heartbeat.Interval < 1 || c.Heartbeat.Interval > int(time.Hour/time.Second):
		return fmt.Errorf("heartbeat.interval is %d; give 1 to 3600 seconds", c.Heartbeat.Interval)
	case c.Blobs.MaxBytes < 0:
		return errors.New("blobs.max_bytes is negative")
	case len(e.Endpoints) == 0 && e.CA+e.Cert+e.Key != "":
		return errors.New("etcd.external has files but no endpoints")
	}
	return nil
}
