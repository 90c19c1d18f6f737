package apiserver

import (
	"context"
	"fmt"
	"slices"
	"time"

	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/util/filesystem"
	"k8s.io/client-go/informers"
	"k8s.io/klog/v2"
	kubeauthenticator "k8s.io/kubernetes/pkg/kubeapiserver/authenticator"
	kubeauthorizer "k8s.io/kubernetes/pkg/kubeapiserver/authorizer"
	"k8s.io/kubernetes/pkg/kubeapiserver/authorizer/modes"
	kubeoptions "k8s.io/kubernetes/pkg/kubeapiserver/options"
)

const (
	// configPollPeriod is how often a configuration file is read where its changes cannot be watched, as upstream.
	configPollPeriod = time.Minute
	// reloadTimeout bounds how long the issuers of a changed configuration file may take to answer, as upstream.
	reloadTimeout = time.Minute
)

// NewAuthenticationOptions are upstream's options for who else is believed: OIDC, a webhook, a file of tokens, a file of
// structured configuration, anonymous requests. Their AddFlags gives upstream's flags. Client certificates, the front proxy,
// service-account and bootstrap tokens are knarr's own and always on.
func NewAuthenticationOptions() *kubeoptions.BuiltInAuthenticationOptions {
	return kubeoptions.NewBuiltInAuthenticationOptions().WithAnonymous().WithOIDC().WithTokenFile().WithWebHook()
}

// NewAuthorizationOptions are upstream's options for who decides, set to knarr's default: what a node needs for its own
// pods, then RBAC.
func NewAuthorizationOptions() *kubeoptions.BuiltInAuthorizationOptions {
	o := kubeoptions.NewBuiltInAuthorizationOptions()
	o.Modes = []string{modes.ModeNode, modes.ModeRBAC}
	return o
}

// authenticationConfig is what the options ask for, without what is knarr's own.
func authenticationConfig(o *kubeoptions.BuiltInAuthenticationOptions) (kubeauthenticator.Config, error) {
	if o == nil {
		return kubeauthenticator.Config{Anonymous: apiserver.AnonymousAuthConfig{Enabled: true}, TokenSuccessCacheTTL: tokenCacheTTL}, nil
	}
	config, err := o.ToAuthenticationConfig()
	if err != nil {
		return config, fmt.Errorf("authentication: %w", err)
	}
	config.APIServerID = serverID
	return config, nil
}

// authorizationConfig is what the options ask for; nil options mean Node and RBAC.
func authorizationConfig(o *kubeoptions.BuiltInAuthorizationOptions, i informers.SharedInformerFactory) (*kubeauthorizer.Config, error) {
	if o == nil {
		o = NewAuthorizationOptions()
	}
	config, err := o.ToAuthorizationConfig(i)
	if err != nil {
		return nil, fmt.Errorf("authorization: %w", err)
	}
	return config, nil
}

// isDefaultAuthorization reports whether Node and RBAC decide, and nobody else.
func isDefaultAuthorization(o *kubeoptions.BuiltInAuthorizationOptions) bool {
	return o == nil || o.AuthorizationConfigurationFile == "" && slices.Equal(o.Modes, []string{modes.ModeNode, modes.ModeRBAC})
}

// reloader follows the file of structured authentication configuration. A file that does not hold is said in the log, and
// what held before goes on; whether anonymous requests are let in is fixed at the start, as upstream.
type reloader struct {
	options *kubeoptions.BuiltInAuthenticationOptions
	update  func(context.Context, *apiserver.AuthenticationConfiguration) error
	seen    string
}

func (r *reloader) run(ctx context.Context) {
	failed := func(err error) {
		klog.ErrorS(err, "Cannot watch the authentication configuration", "file", r.options.AuthenticationConfigFile)
	}
	filesystem.WatchUntil(ctx, configPollPeriod, r.options.AuthenticationConfigFile, func() { r.reload(ctx) }, failed)
}

func (r *reloader) reload(ctx context.Context) {
	config, err := r.options.ToAuthenticationConfig()
	if err == nil && config.AuthenticationConfigData == r.seen {
		return
	}
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, reloadTimeout)
		defer cancel()
		err = r.update(ctx, config.AuthenticationConfig)
	}
	if err != nil {
		klog.ErrorS(err, "The authentication configuration is not taken over", "file", r.options.AuthenticationConfigFile)
		return
	}
	r.seen = config.AuthenticationConfigData
}
