package image

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	crierrors "k8s.io/cri-api/pkg/errors"
)

// Errors of Pull, for errors.Is.
var (
	// ErrUnauthorized: the registry wants credentials, other ones, or more rights.
	ErrUnauthorized = errors.New("unauthorized")
	// ErrRegistryUnavailable: the registry answers that it cannot serve now (HTTP 429 and 5xx).
	ErrRegistryUnavailable = errors.New("the registry is unavailable")
	// ErrUnreachable: there was no connection to the registry (no such host, no route, refused, timeout).
	ErrUnreachable = errors.New(`the registry cannot be reached from this node; without a network load the image with "knarr image import" or "knarr image build"`)
)

// classify marks an error of the registry client with the kind that it is, and keeps its text.
func classify(err error) error {
	var st remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &st) {
		switch {
		case st.StatusCode == http.StatusUnauthorized || st.StatusCode == http.StatusForbidden:
			return fmt.Errorf("%w: %w", ErrUnauthorized, err)
		case st.StatusCode == http.StatusTooManyRequests || st.StatusCode >= http.StatusInternalServerError:
			return fmt.Errorf("%w: %w", ErrRegistryUnavailable, err)
		}
		return err
	}
	if errors.Is(err, docker.ErrInvalidAuthorization) {
		return fmt.Errorf("%w: %w", ErrUnauthorized, err)
	}
	var dialErr *dialError
	var netErr net.Error
	if errors.As(err, &dialErr) || errors.As(err, &netErr) && netErr.Timeout() || errors.Is(err, errStalled) {
		return fmt.Errorf("%w: %w", err, ErrUnreachable)
	}
	return err
}

// code returns the gRPC code that err has for CRI clients.
func code(err error) codes.Code {
	switch {
	case errdefs.IsNotFound(err):
		return codes.NotFound
	case errors.Is(err, ErrUnauthorized):
		return codes.Unauthenticated
	case errors.Is(err, ErrRegistryUnavailable), errors.Is(err, ErrUnreachable):
		return codes.Unavailable
	case errdefs.IsInvalidArgument(err):
		return codes.InvalidArgument
	case errdefs.IsFailedPrecondition(err):
		return codes.FailedPrecondition
	case errdefs.IsNotImplemented(err):
		return codes.Unimplemented
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	return codes.Unknown
}

// criError gives err the form that CRI clients know: a gRPC status, which crierrors.IsNotFound sees. The kubelet's
// image manager tells an unavailable registry by the beginning of the text, so that one is a type of its own.
func criError(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ErrRegistryUnavailable) {
		return &unavailableError{err}
	}
	return status.Error(code(err), err.Error())
}

// unavailableError prints as "RegistryUnavailable: ..." (what pkg/kubelet/images looks for) and is a gRPC status too.
type unavailableError struct{ err error }

func (e *unavailableError) Error() string {
	return crierrors.ErrRegistryUnavailable.Error() + ": " + e.err.Error()
}

func (e *unavailableError) Unwrap() []error { return []error{crierrors.ErrRegistryUnavailable, e.err} }

// GRPCStatus makes status.FromError work.
func (e *unavailableError) GRPCStatus() *status.Status {
	return status.New(codes.Unavailable, e.Error())
}
