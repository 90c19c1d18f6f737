package h2

import (
	"net/http"
	"sync/atomic"
	"time"
)

// dated is the text of one second.
type dated struct {
	second int64
	text   string
}

var lastDate atomic.Pointer[dated]

// Date is the value of a Date header field (RFC 9110, section 6.6.1), made once a second at most. Safe for concurrent use.
func Date(now time.Time) string {
	d := lastDate.Load()
	if d == nil || d.second != now.Unix() {
		d = &dated{now.Unix(), now.UTC().Format(http.TimeFormat)}
		lastDate.Store(d)
	}
	return d.text
}
