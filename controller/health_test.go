package controller

import (
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/controller/broker"
	"github.com/nix-infra/nix-infra/protocol"
)

// A viewer may ask how the controller is. What does not answer is told of, and keeps nobody waiting.
func TestShowHealth(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	vera := r.person("vera", protocol.Viewer)
	vera.ask(protocol.ListNodes, protocol.Page{}) // something to be on record
	h := asked[protocol.ControllerHealth](t, vera, protocol.ShowHealth, nil)
	if h.Version != protocol.Build() || time.Since(h.Time).Abs() > time.Minute || h.Etcd != "" || h.Records.Error != "" {
		t.Errorf("%+v", h)
	}
	if h.Records.Messages < 2 || h.Records.Bytes == 0 || h.DiskTotal <= 0 || h.DiskFree <= 0 || h.DiskFree > h.DiskTotal {
		t.Errorf("%+v", h)
	}
	must(t, r.c.broker.JS.DeleteStream(t.Context(), broker.AuditStream))
	term := r.c.current.Load()
	answer, err := term.showHealth(t.Context(), nil)
	must(t, err)
	if h := answer.(protocol.ControllerHealth); h.Records.Error == "" || h.Etcd != "" {
		t.Errorf("without the record: %+v", h)
	}
}
