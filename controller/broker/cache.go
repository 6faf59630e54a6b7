package broker

import (
	"container/list"
	"sync"
)

// Cache keeps what was used last, up to a weight in all. It is safe for concurrent use.
type Cache[V any] struct {
	max int64

	mu     sync.Mutex
	weight int64
	order  *list.List // front: used last
	byKey  map[string]*list.Element
}

type cached[V any] struct {
	key    string
	value  V
	weight int64
}

// NewCache makes a cache for values whose weights sum up to at most max.
func NewCache[V any](max int64) *Cache[V] {
	return &Cache[V]{max: max, order: list.New(), byKey: map[string]*list.Element{}}
}

// Get finds a value.
func (c *Cache[V]) Get(key string) (V, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.byKey[key]
	if !ok {
		var none V
		return none, false
	}
	c.order.MoveToFront(e)
	return e.Value.(*cached[V]).value, true
}

// Add keeps a value, at the cost of those that were not used for the longest time. A value that is
// heavier than the whole cache is not kept.
func (c *Cache[V]) Add(key string, value V, weight int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.byKey[key]; ok {
		c.drop(e)
	}
	if weight > c.max {
		return
	}
	c.byKey[key] = c.order.PushFront(&cached[V]{key, value, weight})
	c.weight += weight
	for c.weight > c.max {
		c.drop(c.order.Back())
	}
}

// Remove forgets a value.
func (c *Cache[V]) Remove(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.byKey[key]; ok {
		c.drop(e)
	}
}

func (c *Cache[V]) drop(e *list.Element) {
	v := c.order.Remove(e).(*cached[V])
	c.weight -= v.weight
	delete(c.byKey, v.key)
}
