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

// date is the Date field's value, made once a second at most.
func date(now time.Time) string {
	d := lastDate.Load()
	if d == nil || d.second != now.Unix() {
		d = &dated{now.Unix(), now.UTC().Format(http.TimeFormat)}
		lastDate.Store(d)
	}
	return d.text
}

// Date is the value of a Date header field for now.
func Date(now time.Time) string { return date(now) }
