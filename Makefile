# knarr: `make build`, then `make demo`. All targets: see README.md.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

KUBERNETES := v1.36.3
VERSION    := $(KUBERNETES)+knarr
COMMIT     := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
DATE       := $(shell TZ=UTC0 git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd 2>/dev/null || echo 1970-01-01T00:00:00Z)
STAMP      := $(foreach p,k8s.io/component-base/version k8s.io/client-go/pkg/version,\
	-X $(p).gitVersion=$(VERSION) -X $(p).gitMajor=1 -X $(p).gitMinor=36 -X $(p).gitCommit=$(COMMIT) \
	-X $(p).gitTreeState=clean -X $(p).buildDate=$(DATE))
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Packages small enough for the race detector: none of them links the whole of Kubernetes.
LIGHT := ./store/... ./internal/pidlock ./apiserver/h2 ./apiserver/pieces ./system/pki/... ./system/tunnel ./internal/checks ./internal/rig ./node/shim/... ./node/image/... ./network/... ./bench/load

# One way of compiling for programs and tests, so that each package of Kubernetes is compiled once.
export CGO_ENABLED := 0
export GOFLAGS := -trimpath

# The container runtime's own library needs a C compiler; all else is compiled without one.
CGO  = ./cmd/knarr-shim/... ./node/shim/... ./node/runtime/...
PURE = $$(go list ./... | grep -v -E '^knarr/(cmd/knarr-shim|node/shim|node/runtime)(/|$$)')

# What reads bytes that others chose: package:target. See docs/fuzzing.md.
FUZZ = store/pebble:FuzzValue api:FuzzStored apiserver:FuzzWrite apiserver:FuzzPatch apiserver:FuzzRead apiserver:FuzzContinue apiserver:FuzzPath apiserver/h2:FuzzFrames apiserver/h2:FuzzBlocks

.PHONY: build demo test check fuzz bench bench-compare clients conformance clean deps kubectl shimdeps testdeps

build: shimdeps
	go build -ldflags '-s -w $(strip $(STAMP))' -o bin/knarr ./cmd/knarr
	CGO_ENABLED=1 go build -tags 'seccomp netgo osusergo' -ldflags '-s -w -extldflags -static' -o bin/knarr-shim ./cmd/knarr-shim

demo: build testdeps
	go run ./examples/demo

# Upstream's own kubectl, for tests.
kubectl:
	go build -ldflags '-s -w $(strip $(STAMP))' -o bin/kubectl k8s.io/kubernetes/cmd/kubectl

test: build testdeps kubectl
	status=0; \
	KNARR_BIN=$(CURDIR)/bin go test -timeout 20m $(PURE) || status=1; \
	CGO_ENABLED=1 go test -timeout 20m $(CGO) || status=1; \
	KNARR_BIN=$(CURDIR)/bin go test -C test/clients -count=1 -short -timeout 20m . || status=1; \
	KNARR_BIN=$(CURDIR)/bin go test -C test/conformance -count=1 -timeout 60m . || status=1; \
	exit $$status

check:
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$unformatted" ]; then echo "gofmt would change: $$unformatted" >&2; exit 1; fi
	go test ./internal/checks
	go vet $(PURE)
	CGO_ENABLED=1 go vet $(CGO)
	go run $(STATICCHECK) $(PURE)
	CGO_ENABLED=1 go run $(STATICCHECK) $(CGO)
	CGO_ENABLED=1 go test -race $(LIGHT)

# Each target for a while, one after the other: make fuzz FUZZTIME=10m. The compiler instruments all of Kubernetes for it once.
fuzz: FUZZTIME ?= 10m
fuzz:
	for f in $(FUZZ); do go test -run '^$$' -fuzz "^$${f#*:}\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 2s -parallel 1 ./$${f%:*}; done

# Helm, Kustomize, client-go, controller-runtime and operators against a cluster of ours. See docs/clients.md.
clients: build testdeps kubectl
	KNARR_BIN=$(CURDIR)/bin go test -C test/clients -count=1 -timeout 60m -v .

bench: build testdeps
	go run ./bench

# Beside upstream Kubernetes, in one run: see docs/performance.md. Quick: make bench-compare OBJECTS=1000 ROUNDS=1
bench-compare: PHASES ?= all
bench-compare: SIDES ?= upstream,knarr
bench-compare: ROUNDS ?= 3
bench-compare: OBJECTS ?= 5000
bench-compare: CONNECTIONS ?= 1
bench-compare: build testdeps
	@.ci/need containerd:/usr/bin/containerd runc:/usr/sbin/runc containernetworking-plugins:/usr/lib/cni/bridge
	go build -C bench/compare -o ../../out/compare/bin/compare .
	out/compare/bin/compare -top . -phases $(PHASES) -sides $(SIDES) -rounds $(ROUNDS) -objects $(OBJECTS) -connections $(CONNECTIONS)

# Upstream's own suite against a cluster of ours: make conformance FOCUS='\[sig-cli\].*\[Conformance\]'. See docs/conformance.md.
conformance: FOCUS ?= \[Conformance\]
conformance: PARALLEL ?= 1
conformance: build
	@.ci/need busybox-static:/bin/busybox mmdebstrap:/usr/bin/mmdebstrap
	go build -C test/conformance -o ../../out/conformance/bin/conformance .
	out/conformance/bin/conformance -top . -focus '$(FOCUS)' -skip '$(SKIP)' -parallel $(PARALLEL)

clean:
	rm -rf bin out

# What Debian's minimal system lacks; installed where we are root, named where not.
shimdeps:
	@.ci/need libseccomp-dev:/usr/include/seccomp.h pkg-config:/usr/bin/pkg-config

testdeps:
	@.ci/need busybox-static:/bin/busybox nftables:/usr/sbin/nft

deps: shimdeps testdeps
