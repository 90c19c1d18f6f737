package dns_test

import (
	"testing"

	"go.uber.org/goleak"
)

// CoreDNS ends the goroutine that closes an upstream's idle connections in a finalizer.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/coredns/coredns/plugin/pkg/proxy.(*Transport).connManager"))
}
