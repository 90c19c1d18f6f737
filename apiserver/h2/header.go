package h2

import (
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
)

// AppendStatus begins a header block: the bytes that stand for an answer's headers. Blocks may be kept and used many times.
func AppendStatus(block []byte, status int) []byte {
	switch status {
	case 200:
		return append(block, 0x80|8)
	case 204:
		return append(block, 0x80|9)
	case 304:
		return append(block, 0x80|11)
	case 400:
		return append(block, 0x80|12)
	case 404:
		return append(block, 0x80|13)
	case 500:
		return append(block, 0x80|14)
	}
	return appendString(appendInt(block, 0, 4, 8), strconv.Itoa(status))
}

// AppendField adds a field to a block. name is in lower case.
func AppendField(block []byte, name, value string) []byte {
	if i := staticNames[name]; i > 0 {
		block = appendInt(block, 0, 4, i)
	} else {
		block = appendString(append(block, 0), name)
	}
	return appendString(block, value)
}

// staticNames are indexes of RFC 7541, appendix A, as far as answers use them.
var staticNames = map[string]uint64{
	"accept-ranges": 18, "access-control-allow-origin": 20, "age": 21, "allow": 22, "cache-control": 24,
	"content-disposition": 25, "content-encoding": 26, "content-language": 27, "content-length": 28, "content-location": 29,
	"content-range": 30, "content-type": 31, "date": 33, "etag": 34, "expires": 36, "last-modified": 44, "link": 45,
	"location": 46, "proxy-authenticate": 48, "refresh": 52, "retry-after": 53, "server": 54, "set-cookie": 55,
	"strict-transport-security": 56, "vary": 59, "via": 60, "www-authenticate": 61,
}

// appendInt appends a number with a prefix of bits bits: RFC 7541, section 5.1.
func appendInt(block []byte, first byte, bits int, v uint64) []byte {
	limit := uint64(1)<<bits - 1
	if v < limit {
		return append(block, first|byte(v))
	}
	block = append(block, first|byte(limit))
	for v -= limit; v >= 128; v >>= 7 {
		block = append(block, byte(v)|0x80)
	}
	return append(block, byte(v))
}

// appendString appends a string as it is: RFC 7541, section 5.2.
func appendString(block []byte, s string) []byte {
	return append(appendInt(block, 0, 7, uint64(len(s))), s...)
}

// appendHeader adds all fields of a header that HTTP/2 carries.
func appendHeader(block []byte, h http.Header) []byte {
	for name, values := range h {
		if !isSendable(name) {
			continue
		}
		lower := lowerName(name)
		for _, v := range values {
			block = AppendField(block, lower, cleanValue(v))
		}
	}
	return block
}

// isSendable tells fields of a message from those of a connection, which HTTP/2 lacks, and from trailers that stand in the header.
func isSendable(name string) bool {
	switch name {
	case "Connection", "Keep-Alive", "Proxy-Connection", "Transfer-Encoding", "Upgrade":
		return false
	}
	return name != "" && !strings.HasPrefix(name, http.TrailerPrefix)
}

func lowerName(name string) string {
	switch name {
	case "Content-Type":
		return "content-type"
	case "Content-Length":
		return "content-length"
	case "Cache-Control":
		return "cache-control"
	case "Audit-Id":
		return "audit-id"
	}
	return strings.ToLower(name)
}

// cleanValue takes line breaks out of a value, as net/http does.
func cleanValue(v string) string {
	if strings.ContainsAny(v, "\r\n") {
		v = strings.NewReplacer("\r", " ", "\n", " ").Replace(v)
	}
	return textproto.TrimString(v)
}

// canonicalNames are the fields that most requests have.
var canonicalNames = map[string]string{
	"accept": "Accept", "accept-encoding": "Accept-Encoding", "authorization": "Authorization", "content-length": "Content-Length",
	"content-type": "Content-Type", "user-agent": "User-Agent", "impersonate-user": "Impersonate-User", "audit-id": "Audit-Id",
	"kubectl-command": "Kubectl-Command", "kubectl-session": "Kubectl-Session", "x-forwarded-for": "X-Forwarded-For",
}

func canonicalName(name string) string {
	if c, ok := canonicalNames[name]; ok {
		return c
	}
	return http.CanonicalHeaderKey(name)
}
