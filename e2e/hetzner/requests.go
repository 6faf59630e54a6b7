package hetzner

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud/schema"
)

// Fault is an answer that a request gets instead of its own, on demand.
type Fault struct {
	Method, Path  string // which requests; a Path that ends in / is of all below it
	Status        int
	Code, Message string // of the error
	Times         int    // for so many requests; zero means once
	Late          bool   // the request is carried out, and only its answer is lost
}

// Fail has requests fail from now on.
func (f *Fake) Fail(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fault.Times = max(fault.Times, 1)
	f.faults = append(f.faults, &fault)
}

// fault takes the first that is meant for a request.
func (f *Fake) fault(r *http.Request) *Fault {
	for _, fault := range f.faults {
		below := strings.HasSuffix(fault.Path, "/") && strings.HasPrefix(r.URL.Path, fault.Path)
		if fault.Times > 0 && fault.Method == r.Method && (below || fault.Path == r.URL.Path) {
			fault.Times--
			return fault
		}
	}
	return nil
}

// refusal is an error in the API's format.
type refusal struct {
	status        int
	code, message string
	details       any
}

func (r *refusal) Error() string { return r.message }

func refused(status int, code, format string, args ...any) *refusal {
	return &refusal{status: status, code: code, message: fmt.Sprintf(format, args...)}
}

// invalid refuses what a field of the request says.
func invalid(field, format string, args ...any) *refusal {
	why := fmt.Sprintf(format, args...)
	r := refused(http.StatusUnprocessableEntity, "invalid_input", "invalid input in field '%s': %s", field, why)
	r.details = map[string]any{"fields": []map[string]any{{"name": field, "messages": []string{why}}}}
	return r
}

// taken refuses what is there once already.
func taken(field, message string) *refusal {
	r := refused(http.StatusConflict, "uniqueness_error", "%s", message)
	r.details = map[string]any{"fields": []map[string]any{{"name": field}}}
	return r
}

func notFound(what string) *refusal {
	return refused(http.StatusNotFound, "not_found", "%s not found", what)
}

// answer is a request's own.
type answer struct {
	status int
	body   any
}

// ServeHTTP answers one request. They are answered one after the other.
func (f *Fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.options.Clock()
	r.Body = http.MaxBytesReader(w, r.Body, 1<<20)
	a, err := f.respond(w, r)
	if err != nil {
		a = answer{err.status, map[string]any{"error": map[string]any{"code": err.code, "message": err.message, "details": err.details}}}
	}
	f.log = append(f.log, Request{r.Method, r.URL.Path, a.status})
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Correlation-Id", fmt.Sprintf("fake%d", len(f.log)))
	w.WriteHeader(a.status)
	if a.body != nil {
		_ = json.NewEncoder(w).Encode(a.body)
	}
}

func (f *Fake) respond(w http.ResponseWriter, r *http.Request) (answer, *refusal) {
	if err := f.spend(w.Header()); err != nil {
		return answer{}, err
	}
	if r.Header.Get("Authorization") != "Bearer "+f.options.Token {
		return answer{}, refused(http.StatusUnauthorized, "unauthorized", "unable to authenticate")
	}
	f.advance()
	fault := f.fault(r)
	if fault != nil && !fault.Late {
		return answer{}, refused(fault.Status, fault.Code, "%s", fault.Message)
	}
	a, err := f.route(r)
	if fault != nil {
		return answer{}, refused(fault.Status, fault.Code, "%s", fault.Message)
	}
	return a, err
}

// spend takes one request from the bucket, and says how full it is.
func (f *Fake) spend(h http.Header) *refusal {
	limit, now := float64(f.options.Requests), f.now
	f.bucket = min(limit, f.bucket+float64(now.Sub(f.filled))/float64(f.options.Refill))
	f.filled = now
	full := now.Add(time.Duration((limit - f.bucket) * float64(f.options.Refill)))
	h.Set("RateLimit-Limit", strconv.Itoa(f.options.Requests))
	h.Set("RateLimit-Reset", strconv.FormatInt(int64(math.Ceil(float64(full.UnixNano())/1e9)), 10))
	if f.bucket < 1 {
		h.Set("RateLimit-Remaining", "0")
		return refused(http.StatusTooManyRequests, "rate_limit_exceeded", "limit of %d requests per hour reached", f.options.Requests)
	}
	f.bucket--
	h.Set("RateLimit-Remaining", strconv.Itoa(int(f.bucket)))
	return nil
}

func (f *Fake) route(r *http.Request) (answer, *refusal) {
	path, ok := strings.CutPrefix(r.URL.Path, "/v1/")
	if !ok {
		return answer{}, notFound("endpoint")
	}
	words := strings.Split(path, "/")
	var id int64
	shape := r.Method + " " + words[0]
	if len(words) > 1 {
		n, err := strconv.ParseInt(words[1], 10, 64)
		if err != nil {
			return answer{}, notFound(words[0])
		}
		id, shape = n, shape+"/ID"
	}
	if len(words) > 2 {
		shape += "/" + strings.Join(words[2:], "/")
	}
	query := r.URL.Query()
	switch shape {
	case "GET servers":
		return f.listServers(query)
	case "POST servers":
		return body(r, f.createServer)
	case "GET servers/ID":
		return f.getServer(id)
	case "DELETE servers/ID":
		return f.deleteServer(id)
	case "GET servers/ID/actions":
		return f.listActions(query, id)
	case "POST servers/ID/actions/poweron":
		return f.powerOn(id)
	case "GET actions":
		return f.listActions(query, 0)
	case "GET actions/ID":
		return f.getAction(id)
	case "GET ssh_keys":
		return f.listKeys(query)
	case "POST ssh_keys":
		return body(r, f.createKey)
	case "DELETE ssh_keys/ID":
		return f.deleteKey(id)
	case "GET placement_groups":
		return f.listGroups(query)
	case "GET placement_groups/ID":
		return one(f.groupsShown(), id, "placement_group", func(g schema.PlacementGroup) int64 { return g.ID })
	case "POST placement_groups":
		return body(r, f.createGroup)
	case "GET networks":
		return list(f, query, "networks", f.networks, func(n schema.Network) (string, map[string]string) { return n.Name, n.Labels })
	case "GET firewalls":
		return list(f, query, "firewalls", f.firewalls, func(w schema.Firewall) (string, map[string]string) { return w.Name, w.Labels })
	case "GET locations":
		return list(f, query, "locations", locations, func(l schema.Location) (string, map[string]string) { return l.Name, nil })
	case "GET server_types":
		return list(f, query, "server_types", f.serverTypes(), func(t schema.ServerType) (string, map[string]string) { return t.Name, nil })
	case "GET images":
		return f.listImages(query)
	case "GET images/ID":
		return one(images, id, "image", func(i schema.Image) int64 { return i.ID })
	case "GET pricing":
		return answer{http.StatusOK, schema.PricingGetResponse{Pricing: f.pricing()}}, nil
	}
	return answer{}, notFound("endpoint")
}

// body reads a request's body for what handles it.
func body[T any](r *http.Request, handle func(T) (answer, *refusal)) (answer, *refusal) {
	var in T
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		return answer{}, refused(http.StatusBadRequest, "json_error", "invalid JSON: %v", err)
	}
	return handle(in)
}

// list is a page of those that have the name and the labels that are asked for.
func list[T any](f *Fake, query url.Values, key string, all []T, called func(T) (string, map[string]string)) (answer, *refusal) {
	var found []T
	for _, t := range all {
		name, labels := called(t)
		fits, err := selects(query.Get("label_selector"), labels)
		if err != nil {
			return answer{}, err
		}
		if fits && (!query.Has("name") || query.Get("name") == name) {
			found = append(found, t)
		}
	}
	return page(f, query, key, found)
}

// page cuts a page out.
func page[T any](f *Fake, query url.Values, key string, all []T) (answer, *refusal) {
	number, per := 1, min(25, f.options.PerPage)
	for name, value := range map[string]*int{"page": &number, "per_page": &per} {
		if !query.Has(name) {
			continue
		}
		n, err := strconv.Atoi(query.Get(name))
		if err != nil || n < 1 {
			return answer{}, invalid(name, "must be a positive number")
		}
		*value = n
	}
	per = min(per, f.options.PerPage)
	last := max(1, (len(all)+per-1)/per)
	from := min((number-1)*per, len(all))
	meta := map[string]any{"page": number, "per_page": per, "previous_page": nil, "next_page": nil, "last_page": last, "total_entries": len(all)}
	if number > 1 {
		meta["previous_page"] = number - 1
	}
	if number < last {
		meta["next_page"] = number + 1
	}
	return answer{http.StatusOK, map[string]any{key: append([]T{}, all[from:min(from+per, len(all))]...), "meta": map[string]any{"pagination": meta}}}, nil
}

func one[T any](all []T, id int64, key string, idOf func(T) int64) (answer, *refusal) {
	for _, t := range all {
		if idOf(t) == id {
			return answer{http.StatusOK, map[string]any{key: t}}, nil
		}
	}
	return answer{}, notFound(key)
}

// selects tells whether labels fit a selector: its parts are KEY, !KEY, KEY=VALUE, KEY==VALUE and KEY!=VALUE. Those with
// `in` are not known here.
func selects(selector string, labels map[string]string) (bool, *refusal) {
	if selector == "" {
		return true, nil
	}
	for part := range strings.SplitSeq(selector, ",") {
		if strings.ContainsAny(part, " ()") {
			return false, invalid("label_selector", "this fake does not know the selector %q", part)
		}
		key, value, equals := strings.Cut(strings.Replace(part, "==", "=", 1), "=")
		not := strings.HasPrefix(key, "!") || strings.HasSuffix(key, "!")
		have, there := labels[strings.Trim(key, "!")]
		if fits := there && (!equals || have == value); fits == not {
			return false, nil
		}
	}
	return true, nil
}
