package hetzner

import (
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud/schema"
)

// action is something that takes its time.
type action struct {
	schema.Action
	server *server
	after  *action              // begins when that one has ended
	ready  func() (bool, error) // besides the time; nil: only the time counts
	effect func()               // what is so when it has succeeded
}

// FailAction has the next action of that kind on that server end in an error, such as create_server or start_server.
func (f *Fake) FailAction(server, command, code, message string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failing[server+" "+command] = schema.ActionError{Code: code, Message: message}
}

func (f *Fake) begin(s *server, command string, after *action, ready func() (bool, error), effect func()) *action {
	a := &action{
		Action: schema.Action{
			ID: f.id(), Status: "running", Command: command, Started: f.now,
			Resources: []schema.ActionResourceReference{{ID: s.ID, Type: "server"}},
		},
		server: s, after: after, ready: ready, effect: effect,
	}
	f.actions = append(f.actions, a)
	return a
}

// advance has come about what has come about until now. Time passes here only while somebody looks.
func (f *Fake) advance() {
	now := f.now
	for _, a := range f.actions {
		if a.Status != "running" {
			continue
		}
		if a.after != nil {
			switch a.after.Status {
			case "running":
				a.Started = now
				continue
			case "error":
				a.end(now, &schema.ActionError{Code: "action_failed", Message: "a preceding action failed"})
				continue
			}
		}
		a.Progress = 99
		if took := now.Sub(a.Started); took < f.options.ActionTime {
			a.Progress = int(99 * took / f.options.ActionTime)
			continue
		}
		key := a.server.Name + " " + a.Command
		if failure, ok := f.failing[key]; ok {
			delete(f.failing, key)
			a.end(now, &failure)
			continue
		}
		if a.ready != nil {
			done, err := a.ready()
			if err != nil {
				a.end(now, &schema.ActionError{Code: "action_failed", Message: err.Error()})
				continue
			}
			if !done {
				continue
			}
		}
		a.end(now, nil)
		a.effect()
	}
}

func (a *action) end(now time.Time, failure *schema.ActionError) {
	a.Finished, a.Error, a.Status, a.Progress = &now, failure, "success", 100
	if failure != nil {
		a.Status = "error"
	}
}

// busy tells whether something is being done with a server.
func (f *Fake) busy(s *server) bool {
	return slices.ContainsFunc(f.actions, func(a *action) bool { return a.server == s && a.Status == "running" })
}

func (f *Fake) getAction(id int64) (answer, *refusal) {
	for _, a := range f.actions {
		if a.ID == id {
			return answer{http.StatusOK, schema.ActionGetResponse{Action: a.Action}}, nil
		}
	}
	return answer{}, notFound("action")
}

// listActions lists those of a server, or, for 0, those whose ids are asked for.
func (f *Fake) listActions(query url.Values, server int64) (answer, *refusal) {
	if server == 0 && !query.Has("id") {
		return answer{}, refused(http.StatusGone, "deprecated_api_endpoint", "listing all actions is no longer possible; ask for ids")
	}
	if server != 0 && f.server(server) == nil {
		return answer{}, notFound("server")
	}
	var found []schema.Action
	for _, a := range f.actions {
		wanted := server == 0 && slices.Contains(query["id"], strconv.FormatInt(a.ID, 10)) || server != 0 && a.server.ID == server
		if wanted && (!query.Has("status") || slices.Contains(query["status"], a.Status)) {
			found = append(found, a.Action)
		}
	}
	return page(f, query, "actions", found)
}
